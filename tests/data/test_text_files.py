"""Text files: every format gives the same documents, and what is wrong is named with its file and line."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from tikmix_fast.data import text_files
from tikmix_fast.data.text_files import read_text

DOCUMENTS = ["one\ntwo", "", "drei: äöü, 数, 🙂", "x" * 5000]


def needs(package):
    return pytest.importorskip(package, reason=f"needs the extra 'data' ({package})")


def lines(documents, **more):
    return "".join(json.dumps({"text": document, **more}) + "\n" for document in documents).encode()


def zst(content):
    arrow = needs("pyarrow")
    return arrow.compress(content, codec="zstd", asbytes=True)


def write_parquet(path, documents, **options):
    arrow, parquet = needs("pyarrow"), needs("pyarrow.parquet")
    parquet.write_table(arrow.table({"id": list(range(len(documents))), "text": documents}), path, **options)


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zst}


@pytest.mark.parametrize("packing", PACK)
def test_jsonl_gives_its_documents_with_their_lines(tmp_path, packing):
    file = tmp_path / f"a.jsonl{packing}"
    file.write_bytes(PACK[packing](lines(DOCUMENTS, id=1) + b"\n" + lines(["last"])))
    pieces = list(read_text(file))
    assert [piece.text for piece in pieces] == [*filter(None, DOCUMENTS), "last"]
    assert [piece.where for piece in pieces] == [f"{file}:{line}" for line in (1, 3, 4, 6)]
    assert all(piece.ends for piece in pieces)


@pytest.mark.parametrize("rows", [2, 10_000])
def test_parquet_gives_its_documents_with_their_rows(tmp_path, rows):
    file = tmp_path / "a.parquet"
    write_parquet(file, DOCUMENTS * 200, row_group_size=rows)
    pieces = list(read_text(file))
    assert [piece.text for piece in pieces] == list(filter(None, DOCUMENTS * 200))
    assert pieces[-1].where == f"{file}, row 800"


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("block", [1, 3, 7, 1 << 20])
def test_a_txt_is_one_document_however_it_is_cut(tmp_path, monkeypatch, packing, block):
    monkeypatch.setattr(text_files, "_BLOCK", block)
    text = "\n".join(DOCUMENTS[:3]) + "\r\nno line break 数" * 20
    file = tmp_path / f"a.txt{packing}"
    file.write_bytes(PACK[packing](text.encode()))
    pieces = list(read_text(file))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert (len(pieces) > 1) == (block < 10)


def test_a_piece_of_a_txt_is_named_by_its_first_line(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK", 6)
    file = tmp_path / "a.txt"
    file.write_text("".join(f"{number:04}\n" for number in range(1, 50)))
    for piece in read_text(file):
        assert piece.where == f"{file}:{int(piece.text[:4])}"


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(["a"]))
    assert [piece.text for name in ("a.txt", "a.jsonl") for piece in read_text(tmp_path / name)] == ["a", "a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: must contain text"),
        ("a.txt", b"\xef\xbb\xbf", "a.txt: must contain text"),
        ("a.txt", b"one\ntwo\nthr\xffee\n", "a.txt:3: must be UTF-8"),
        ("a.txt", b"one\ntwo\xe6\x95", "a.txt:2: must be UTF-8"),
        ("a.txt", "one\ntwo".encode("utf-16"), "a.txt:1: must be UTF-8"),
        ("a.txt.gz", b"one", r"a.txt.gz:1: the file is damaged"),
        ("a.jsonl", b"", "a.jsonl: must contain text"),
        ("a.jsonl", b"\n \n", "a.jsonl: must contain text"),
        ("a.jsonl", lines(["", ""]), "a.jsonl: must contain text"),
        ("a.jsonl", lines(["a"]) + b"\n{'text': 1}\n", "a.jsonl:3: must be one JSON object"),
        ("a.jsonl", lines(["a", "b"])[:-5], "a.jsonl:2: must be one JSON object"),
        ("a.jsonl", lines(["a"]) + b'["text"]\n', "a.jsonl:2: must be one JSON object; got list"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
            r"a.jsonl:2: must have the column 'text'; got \['body'\].*text_column",
        ),
        ("a.jsonl", b'{"text": null}\n', "a.jsonl:1: 'text' must be a string; got NoneType"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: must be UTF-8"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: must be one JSON object"),
        ("a.csv", b"text", "a.csv: must end in one of"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_text(tmp_path / name))


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_a_compressed_file_cut_short_is_an_error(tmp_path, packing, name, keep):
    numbers = [str(number**7) for number in range(3000)]
    content = PACK[packing](lines(numbers) if name == "a.jsonl" else "\n".join(numbers).encode())
    file = tmp_path / (name + packing)
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=rf"{name}{packing}:\d+: the file is damaged or cut short"):
        list(read_text(file))


def test_several_compressed_parts_are_one_file(tmp_path):
    for packing in PACK:
        file = tmp_path / f"a.jsonl{packing}"
        file.write_bytes(PACK[packing](lines(["a"])) + PACK[packing](lines(["b"])))
        assert [piece.text for piece in read_text(file)] == ["a", "b"]


def test_bad_parquet_files(tmp_path):
    file = tmp_path / "a.parquet"
    write_parquet(file, [f"{number**7}" for number in range(5000)], row_group_size=1000)
    content = file.read_bytes()
    for wrong in (b"", content[:-20], content[: len(content) // 2], b"text"):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"a.parquet, row 1: the file is damaged, cut short or not parquet"):
            list(read_text(file))
    write_parquet(file, ["a", None])
    with pytest.raises(ValueError, match=r"a.parquet, row 2: 'text' must be a string; got NoneType"):
        list(read_text(file))
    with pytest.raises(ValueError, match=r"a.parquet: must have the column 'body'; got \['id', 'text'\]"):
        list(read_text(file, "body"))
    with pytest.raises(ValueError, match="row 1: 'id' must be a string; got int"):
        list(read_text(file, "id"))
    write_parquet(file, [])
    with pytest.raises(ValueError, match=r"a.parquet: must contain text"):
        list(read_text(file))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_missing_file_stays_that(tmp_path, name):
    if name.endswith((".zst", ".parquet")):
        needs("pyarrow")
    with pytest.raises(FileNotFoundError, match=name):
        list(read_text(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet"])
def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ImportError, match=r"needs the package pyarrow; install it: pip install 'tikmix_fast\[data\]'"):
        list(read_text(tmp_path / name))
