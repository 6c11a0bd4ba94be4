"""Token files: any format, any size, and nothing wrong goes unseen."""

from __future__ import annotations

import itertools
import pickle
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader

from tikmix_fast import MixtureSampler
from tikmix_fast.data.token_files import TokenFile, TokenSequences

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a machine with one core
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python 3.12 and newer, threads of torch
]

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_index(path, lengths, code, *, magic=b"MMIDIDX\x00\x00", version=1):
    """Write what Megatron's _IndexWriter does: header, lengths, places, ends of documents."""
    size = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 8: 2}[code]
    places = np.cumsum([0, *lengths[:-1]]) * size
    content = magic + struct.pack("<QBQQ", version, code, len(lengths), len(lengths) + 1)
    content += np.array(lengths, "<i4").tobytes() + places.astype("<i8").tobytes()
    path.write_bytes(content + np.arange(len(lengths) + 1).astype("<i8").tobytes())


def save(path, tokens, dtype):
    if path.suffix == ".npy":
        np.save(path, np.asarray(tokens, dtype))
    else:
        np.asarray(tokens, np.dtype(dtype).newbyteorder("<")).tofile(path)
    return path


DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"]


@pytest.mark.parametrize(("suffix", "dtype"), [(".npy", ">u2"), *itertools.product((".npy", ".bin"), DTYPES)])
def test_every_dtype_is_read(tmp_path, dtype, suffix):
    tokens = np.arange(100)
    data = TokenSequences([save(tmp_path / f"a{suffix}", tokens, dtype)], 7, dtype=None if suffix == ".npy" else dtype)
    assert len(data) == 14
    assert torch.equal(torch.stack([data[i] for i in range(14)]), torch.arange(99).unfold(0, 8, 7))
    assert data[0].dtype == torch.int64


@pytest.mark.parametrize("dtype", CODES)
def test_a_megatron_index_tells_the_dtype(tmp_path, dtype):
    save(tmp_path / "a.bin", np.arange(100), dtype)
    write_index(tmp_path / "a.idx", [60, 0, 40], CODES[dtype])
    assert TokenFile.open(tmp_path / "a.bin") == TokenFile(tmp_path / "a.bin", np.dtype(dtype), 0, 100)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), length=st.integers(1, 30))
def test_files_are_one_text(tmp_path_factory, sizes, length):
    folder = tmp_path_factory.mktemp("tokens")
    tokens = np.random.default_rng(0).integers(0, 60_000, sum(sizes))
    ends = np.cumsum(sizes)
    files = [
        save(folder / f"{number}{'.npy' if number % 2 else '.bin'}", tokens[end - size : end], "uint16")
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    if len(tokens) <= length:
        with pytest.raises(ValueError, match=f"more than one sequence of {length} tokens; got {len(tokens)}"):
            TokenSequences(files, length, dtype="uint16")
        return
    data = TokenSequences(files, length, dtype="uint16")
    expected = torch.from_numpy(tokens).unfold(0, length + 1, length)
    assert torch.equal(torch.stack(list(data)), expected)
    assert torch.equal(data[-1], expected[-1])
    for index in (len(data), -len(data) - 1):
        with pytest.raises(IndexError):
            data[index]


def test_domains_are_mixed_by_the_sampler_in_worker_processes(tmp_path):
    domains = [
        TokenSequences([save(tmp_path / f"{name}.npy", np.arange(start, start + size), "int32")], 5)
        for name, start, size in (("web", 0, 501), ("code", 1000, 101))
    ]
    data = ConcatDataset(domains)
    sampler = MixtureSampler([len(domain) for domain in domains], [0.75, 0.25], num_samples=80)
    batches = list(DataLoader(data, batch_size=8, sampler=sampler, num_workers=2))
    items = torch.cat(batches)
    assert (items[:, 0] >= 1000).sum() == 20
    assert len(items[:, 0].unique()) == 80
    assert (items.diff() == 1).all()
    assert torch.equal(pickle.loads(pickle.dumps(domains[0]))[3], domains[0][3])


@pytest.mark.parametrize("value", [300, 65_535])
def test_a_token_beyond_the_vocabulary_is_named(tmp_path, value):
    tokens = np.arange(100)
    tokens[57] = value
    data = TokenSequences([save(tmp_path / "a.bin", tokens, "uint16")], 10, dtype="uint16", vocabulary=256)
    assert len(data[4]) == 11
    with pytest.raises(
        ValueError, match=rf"a.bin, token 57: must be from 0 to 255; got {value}; .*its dtype is not uint16"
    ):
        data[5]


def test_the_position_counts_within_its_own_file(tmp_path):
    files = [save(tmp_path / "a.npy", np.arange(10), "int32"), save(tmp_path / "b.npy", [1, -3, 1], "int32")]
    with pytest.raises(ValueError, match=r"b.npy, token 1: must be not negative; got -3"):
        TokenSequences(files, 4)[2]


def bad_files(folder):
    save(folder / "floats.npy", np.ones(9), "float32")
    save(folder / "square.npy", np.ones((3, 3)), "int32")
    save(folder / "none.npy", [], "int32")
    np.save(folder / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    content = save(folder / "cut.npy", np.arange(100), "int32").read_bytes()
    (folder / "cut.npy").write_bytes(content[:-1])
    (folder / "header.npy").write_bytes(content[:40])
    (folder / "foreign.npy").write_bytes(b"PK\x03\x04" * 10)
    (folder / "empty.npy").write_bytes(b"")
    (folder / "empty.bin").write_bytes(b"")
    (folder / "odd.bin").write_bytes(b"abc")
    for name, (lengths, code, options) in {
        "idx-magic": ([10], 8, {"magic": b"NOTANIDX\x00"}),
        "idx-version": ([10], 8, {"version": 2}),
        "idx-floats": ([10], 6, {}),
        "idx-sizes": ([9], 8, {}),
        "idx-agree": ([10], 8, {}),
        "idx-cut": ([5, 5], 8, {}),
        "idx-header": ([10], 8, {}),
    }.items():
        save(folder / f"{name}.bin", np.arange(10), "uint16")
        write_index(folder / f"{name}.idx", lengths, code, **options)
    for name, size in (("idx-cut", 50), ("idx-header", 20)):
        (folder / f"{name}.idx").write_bytes((folder / f"{name}.idx").read_bytes()[:size])


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("floats.npy", None, "floats.npy: the dtype must be one of uint8.*; got float32"),
        ("square.npy", None, r"square.npy: must have one dimension; got shape \(3, 3\)"),
        ("none.npy", None, "none.npy: must contain tokens"),
        ("objects.npy", None, "objects.npy: the dtype must be one of .*; got object"),
        ("cut.npy", None, "cut.npy: must contain 100 tokens of int32; it is cut short"),
        ("header.npy", None, "header.npy: must be a .npy file; it is damaged or of another kind"),
        ("foreign.npy", None, "foreign.npy: must be a .npy file; it is damaged or of another kind"),
        ("empty.npy", None, "empty.npy: must contain tokens"),
        ("empty.bin", "uint16", "empty.bin: must contain tokens"),
        ("odd.bin", None, "odd.bin: dtype must be stated.*'uint16'.*nanoGPT.*idx"),
        ("odd.bin", "uint16", "odd.bin: its size must be a multiple of 2, for uint16; got 3 bytes"),
        ("odd.bin", "float16", "dtype must be one of .*; got float16"),
        ("idx-magic.bin", None, "idx-magic.idx: must be a Megatron index"),
        ("idx-version.bin", None, "idx-version.idx: must be a Megatron index of version 1"),
        ("idx-floats.bin", None, "idx-floats.idx: must be a Megatron index .*integers"),
        ("idx-sizes.bin", None, "idx-sizes.bin: must contain 9 tokens of uint16, as idx-sizes.idx states; got 20"),
        ("idx-agree.bin", "int32", "idx-agree.bin: dtype must be that of the file, uint16; got int32"),
        ("idx-cut.bin", None, "idx-cut.idx: must describe 2 sequences; it is cut short"),
        ("idx-header.bin", None, "idx-header.idx: must have a header of 34 bytes; it is cut short"),
        ("a.txt", None, "a.txt: must end in one of .npy, .bin"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, dtype, message):
    bad_files(tmp_path)
    with pytest.raises(ValueError, match=message):
        TokenFile.open(tmp_path / name, dtype)


def test_bad_arguments(tmp_path):
    file = save(tmp_path / "a.npy", np.arange(10), "int32")
    with pytest.raises(ValueError, match="length must be an int of at least 1"):
        TokenSequences([file], 0)
    with pytest.raises(ValueError, match="vocabulary must be an int of at least 1"):
        TokenSequences([file], 2, vocabulary=0)
    with pytest.raises(ValueError, match="at least one file"):
        TokenSequences([], 2)
    with pytest.raises(ValueError, match=r"a.npy: must contain more than one sequence of 10 tokens; got 10"):
        TokenSequences([file], 10)
    with pytest.raises(ValueError, match=r"a.npy and the files after it: must contain more"):
        TokenSequences([file, file], 20)
    with pytest.raises(FileNotFoundError, match=re.escape("none.npy")):
        TokenSequences([tmp_path / "none.npy"], 2)


def test_a_file_that_becomes_shorter_is_an_error_and_not_the_end_of_the_process(tmp_path):
    data = TokenSequences([save(tmp_path / "a.bin", np.arange(5000), "uint16")], 10, dtype="uint16")
    with (tmp_path / "a.bin").open("r+b") as file:
        file.truncate(100)
    assert data[0].tolist() == list(range(11))
    with pytest.raises(ValueError, match=r"a.bin: must still have 5000 tokens; it became shorter"):
        data[400]


def test_memory_does_not_grow_with_the_file(tmp_path):
    """1 GB (sparse) is read by 20 MB of sequences all over it, in a process that may not grow by more than 8 MB."""
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(2 * (((1 << 29) - 1) // 1023 * 1023))  # the last target of the last sequence
        file.write(b"\x07\x00")
    script = f"""
import resource, sys
from tikmix_fast.data.token_files import TokenSequences
def peak():  # MB; ru_maxrss is in kB, on macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
data = TokenSequences([{str(tmp_path / "a.bin")!r}], 1023, dtype="uint16")
data[0]
before = peak()
last = int(data[len(data) - 1].sum())
total = sum(int(data[index].sum()) for index in range(0, len(data), len(data) // 10_000))
print(len(data), last, total, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    count, last, total, grown = map(int, done.stdout.split())
    assert count == ((1 << 29) - 1) // 1023
    assert last == 7
    assert total == 0
    assert grown < 8
