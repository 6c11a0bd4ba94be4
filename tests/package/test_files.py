"""A crash while writing leaves the old file or the new one, never half of either."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat

import pytest

from tikmix_fast import files


def test_what_was_written_is_there(tmp_path):
    assert files.write_bytes(tmp_path / "a", b"\x00\xff").read_bytes() == b"\x00\xff"
    assert files.write_text(tmp_path / "b", "ü\n").read_bytes() == "ü\n".encode()
    assert files.write_json(tmp_path / "c", {"x": [1, None]}).read_text() == '{\n "x": [\n  1,\n  null\n ]\n}\n'
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_the_users_umask_holds(tmp_path):
    before = os.umask(0o027)
    try:
        path = files.write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("fails", ["replace", "fsync"])
def test_a_failure_keeps_the_old_content(tmp_path, monkeypatch, fails):
    path = files.write_text(tmp_path / "a", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, fails, fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"], "no temporary file is left"


def test_numbers_that_json_lacks_write_nothing(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a", float("nan"))
    assert not os.listdir(tmp_path)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write_text(tmp_path / "no" / "a", "x")


SEALED = {"format": "mine", "numbers": (1, 0.1, -1e-300, None), 3: {"b": "ü", "a": [True]}}


def test_a_sealed_file_is_read_as_json_has_it(tmp_path):
    path = files.write_sealed_json(tmp_path / "a", SEALED)
    assert files.read_json(path, "mine", sealed=True) == json.loads(json.dumps(SEALED))
    assert len(json.loads(path.read_text())["sha256"]) == 64


def test_the_checksum_is_that_of_the_documented_text(tmp_path):
    path = files.write_sealed_json(tmp_path / "a", {"format": "mine", "x": ["ü", 0.5]})
    text = r'{"format":"mine","x":["\u00fc",0.5]}'
    assert json.loads(path.read_text())["sha256"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("0.1", "0.2"), "its checksum differs"),
        (lambda text: text.replace("sha256", "sha257"), "has no checksum"),
        (lambda text: text.replace("mine", "other"), "is another kind of file: 'format' must be 'mine'; got 'other'"),
        (lambda text: "[]", "is another kind of file"),
        (lambda text: text[:-3], "is not JSON, or cut short"),
        (lambda text: "[" * 100_000, "recursion"),
        (lambda text: "", "is not JSON, or cut short"),
    ],
)
def test_changed_and_foreign_files_are_refused_by_name(tmp_path, change, message):
    path = files.write_sealed_json(tmp_path / "a.json", SEALED)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*{message}"):
        files.read_json(path, "mine", sealed=True)


def test_what_people_write_by_hand_needs_no_checksum(tmp_path):
    by_hand = files.write_json(tmp_path / "a", {"web": 0.5, "sha256": 0.5})
    assert files.read_json(by_hand) == {"web": 0.5, "sha256": 0.5}, "a domain may have any name"
    assert files.read_json(files.write_json(tmp_path / "b", {"format": "mine", "x": 1}), "mine") == {
        "format": "mine",
        "x": 1,
    }


def test_reading_a_missing_file_or_a_folder_names_it(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(OSError, match=re.escape(str(path))):
            files.read_json(path)
