"""A crash while writing leaves the old file or the new one, never half of either."""

from __future__ import annotations

import os
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
