"""A domain on disk: which files it has, and that all formats give the same sequences."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset

from tikmix_fast import MixtureSampler
from tikmix_fast.data.domain import open_domain
from tikmix_fast.data.domain_files import find_files
from tikmix_fast.data.tokenizing import Tokenizer
from tikmix_fast.demo.corpora import Sequences

DOCUMENTS = [f"document {number}: " + "abc " * number for number in range(20)]
TEXT = "".join(document + "\n\n" for document in DOCUMENTS).encode()


def jsonl(documents):
    return "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()


def as_txt(folder):
    for number, document in enumerate(DOCUMENTS):
        (folder / f"{number:02}.txt").write_text(document)


def as_jsonl(folder):
    (folder / "below").mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(DOCUMENTS[:5]))
    (folder / "below" / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(DOCUMENTS[5:])))


def as_parquet(folder):
    arrow = pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra 'data'")
    parquet.write_table(arrow.table({"text": DOCUMENTS}), folder / "a.parquet")


def as_tokens(folder):
    tokens = np.frombuffer(TEXT, np.uint8)
    np.save(folder / "a.npy", tokens[:100])
    np.save(folder / "b.npy", tokens[100:].astype(np.int64))


def as_bin(folder):
    np.frombuffer(TEXT, np.uint8).astype("<u2").tofile(folder / "a.bin")


@pytest.mark.parametrize("write", [as_txt, as_jsonl, as_parquet, as_tokens, as_bin])
def test_every_format_gives_the_sequences_of_the_built_in_corpora(tmp_path, write):
    (tmp_path / "domain").mkdir()
    write(tmp_path / "domain")
    data = open_domain(tmp_path / "domain", 16, cache=tmp_path / "cache", dtype="uint16" if write is as_bin else None)
    expected = Sequences(np.frombuffer(TEXT, np.uint8), 16)
    assert len(data) == len(expected)
    assert torch.equal(torch.stack(list(data)), expected.all())


def test_domains_go_with_the_sampler(tmp_path):
    (tmp_path / "web.txt").write_text("w" * 500)
    (tmp_path / "code.jsonl").write_bytes(jsonl(["c" * 300]))
    domains = {name: open_domain(tmp_path / name, 8, cache=tmp_path / "cache") for name in ("web.txt", "code.jsonl")}
    sampler = MixtureSampler(
        {name: len(data) for name, data in domains.items()}, {"web.txt": 0.25, "code.jsonl": 0.75}, num_samples=40
    )
    data = ConcatDataset(domains.values())
    assert sum(bytes(data[index].tolist()).startswith(b"c") for index in sampler) == 30


def test_other_tokenizers_and_columns(tmp_path):
    domain = tmp_path / "domain"
    domain.mkdir()
    (domain / "a.jsonl").write_text('{"body": "ab"}\n{"body": "ba"}\n')
    letters = Tokenizer("letters", lambda text: [ord(letter) - 97 for letter in text], 3, [2])
    data = open_domain(domain, 5, letters, "body", cache=tmp_path / "cache")
    assert data[0].tolist() == [0, 1, 2, 1, 0, 2]
    assert open_domain(domain / "*.jsonl", 5, letters, "body", cache=tmp_path / "cache")[0].tolist() == [
        0, 1, 2, 1, 0, 2,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="token 2: must be from 0 to 1; got 2"):
        open_domain(domain, 5, letters, "body", cache=tmp_path / "cache", vocabulary=2)[0]


def names(files, folder):
    return [file.relative_to(folder).as_posix() for file in files]


def test_which_files_belong_to_a_domain(tmp_path):
    for name in ("b.txt", "a.jsonl.zst", "c/a.parquet", "README.md", ".hidden.txt", ".cache/x.txt", "a.idx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert names(find_files(tmp_path), tmp_path) == ["a.jsonl.zst", "b.txt", "c/a.parquet"]
    assert names(find_files(tmp_path / "b.txt"), tmp_path) == ["b.txt"]
    assert names(find_files(tmp_path / "**" / "a.*"), tmp_path) == ["a.jsonl.zst", "c/a.parquet"]
    (tmp_path / "[odd]").mkdir()
    (tmp_path / "[odd]" / "a.bin").write_bytes(b"x")
    assert names(find_files(tmp_path / "[odd]"), tmp_path) == ["[odd]/a.bin"]
    with pytest.raises(ValueError, match=r"text or tokens, not both; got .*a.jsonl.zst and .*a.bin.*'\*.bin'"):
        find_files(tmp_path)
    with pytest.raises(ValueError, match=r"README.md: must be or contain files that end in .txt"):
        find_files(tmp_path / "README.md")
    for missing in ("none", "*.npy"):
        with pytest.raises(FileNotFoundError, match=r"no such file or folder"):
            find_files(tmp_path / missing)


def test_bad_domains(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ValueError, match=r"a.txt: cache must be a folder"):
        open_domain(tmp_path / "a.txt", 4)
    with pytest.raises(ValueError, match=r"a.txt: .*more than one sequence of 7 tokens; got 7"):
        open_domain(tmp_path / "a.txt", 7, cache=tmp_path / "cache")
    domain = tmp_path / "domain"
    domain.mkdir()
    (domain / "a.txt").write_text("long enough")
    for inside in (domain, domain / "cache"):
        with pytest.raises(ValueError, match="cache must lie outside the domain"):
            open_domain(domain, 4, cache=inside)
    (domain / "b.txt").write_text("")
    with pytest.raises(ValueError, match=r"b.txt: must contain text"):
        open_domain(domain, 4, cache=tmp_path / "cache")
