"""Random bytes, cut files and flipped bits: every reader works, or refuses the file by name; no pickle is loaded."""

from __future__ import annotations

import ast
import gzip
import json
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import tikmix_fast
from tikmix_fast import InfluenceMatrix, files
from tikmix_fast.checkpoints.adam_files import load_adam, save_adam
from tikmix_fast.checkpoints.checkpoint import load_tokenizer
from tikmix_fast.cli.mix import _read_prior
from tikmix_fast.data.exports.mixtera import read_mixture
from tikmix_fast.data.text_files import read_text
from tikmix_fast.data.token_files import TokenSequences
from tikmix_fast.demo.results import DemoResult
from tikmix_fast.influence.preconditioners.ekfac import EKFAC, DiagonalFisher
from tikmix_fast.matrix.microbatch_record import MicrobatchRecord
from tikmix_fast.mixture.schedule.dynamic import DynamicMixture
from tikmix_fast.mixture.surrogate.mixture_model import MixtureModel
from tikmix_fast.report.result_files import read_sources
from tikmix_fast.tensor_files import write_tensors

NAMES = ("x", "y")
LINES = "".join(json.dumps({"text": f"line {number} ü"}) + "\n" for number in range(5)).encode()


def matrix() -> InfluenceMatrix:
    record = MicrobatchRecord(1, 2, blocks=2)
    for _ in range(3):
        record.add(np.ones((1, 2)), np.array([3.0, 2.0]), np.ones((1, 2)), np.ones((1, 2)))
    plain = InfluenceMatrix.from_values([[1.0, -2.0]], domains=NAMES, tasks=("t",), stderr=[[0.1, 0.2]]).to_dict()
    return InfluenceMatrix.from_dict({**plain, "record": record.to_dict()})


def schedule() -> DynamicMixture:
    return DynamicMixture(NAMES, 10, stages=2)


def write_schedule(path: Path) -> None:
    plan = schedule()
    plan.update(5, matrix())
    plan.save(path)


def write_mixture_model(path: Path) -> None:
    random = np.random.default_rng(0)
    mixtures = random.dirichlet(np.ones(2), 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MixtureModel("ridge", folds=2).fit(mixtures, mixtures @ np.ones((2, 1)) + mixtures[:, :1]).save(path)


def write_fisher(path: Path) -> None:
    squares = {"squares/w": torch.ones(2, 2), "rows/w": torch.eye(2), "columns/w": torch.eye(2)}
    write_tensors(path, "tikmix_fast.fisher", squares, {"version": 1, "kind": "ekfac", "tokens": 4})


def write_adam(path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_adam(path, optimizer, model)


def write_npy(path: Path) -> None:
    np.save(path, np.arange(40, dtype=np.uint16))


def write_parquet(path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table({"text": ["one", "two"]}), path)


def write_zst(path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    path.write_bytes(arrow.compress(LINES, codec="zstd", asbytes=True))


def read_tokens(path: Path) -> None:
    text = TokenSequences([path], 4, vocabulary=70_000)
    for index in range(min(len(text), 20)):
        text[index]


def read_bin(path: Path) -> None:
    text = TokenSequences([path], 4, dtype="uint16", vocabulary=100)
    for index in range(min(len(text), 20)):
        text[index]


def index_file(count: int = 3) -> bytes:
    return struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, count, count + 1) + struct.pack(
        "<3i3q4q", 10, 20, 10, 0, 20, 60, 0, 1, 2, 3
    )


def read_indexed(path: Path) -> None:
    tokens = path.with_suffix(".bin")
    tokens.write_bytes(np.arange(40, dtype="<u2").tobytes())
    TokenSequences([tokens], 4, vocabulary=100)[0]


# Name of the file, what writes it, what reads it.
CASES: dict[str, tuple[str, Callable[[Path], Any], Callable[[Path], Any]]] = {
    "matrix": ("S.json", lambda path: matrix().save(path), InfluenceMatrix.load),
    "report": ("S.json", lambda path: matrix().save(path), lambda path: read_sources([path])),
    "schedule": ("state.json", write_schedule, lambda path: schedule().load(path)),
    "mixture model": ("model.json", write_mixture_model, MixtureModel.load),
    "prior": (
        "mixture.json",
        lambda path: files.write_sealed_json(path, {"format": "tikmix_fast.mixture", "weights": {"x": 1.0, "y": 0.0}}),
        lambda path: _read_prior(str(path), matrix()),
    ),
    "mixture by hand": (
        "mixture.json",
        lambda path: files.write_json(path, {"x": 0.5, "y": 0.5}),
        lambda path: read_mixture(path, NAMES),
    ),
    "results": (
        "results.json",
        lambda path: files.write_sealed_json(path, {"format": "tikmix_fast.demo", "version": 1}),
        DemoResult.load,
    ),
    "fisher": ("P.safetensors", write_fisher, EKFAC.load),
    "adam": ("adam.safetensors", write_adam, load_adam),
    "npy": ("tokens.npy", write_npy, read_tokens),
    "bin": ("tokens.bin", lambda path: path.write_bytes(bytes(80)), read_bin),
    "idx": ("tokens.idx", lambda path: path.write_bytes(index_file()), read_indexed),
    "txt": ("a.txt", lambda path: path.write_bytes(LINES), lambda path: list(read_text(path))),
    "jsonl": ("a.jsonl", lambda path: path.write_bytes(LINES), lambda path: list(read_text(path))),
    "gz": ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINES)), lambda path: list(read_text(path))),
    "zst": ("a.txt.zst", write_zst, lambda path: list(read_text(path))),
    "parquet": ("a.parquet", write_parquet, lambda path: list(read_text(path))),
    "tokenizer": (
        "tokenizer.json",
        lambda path: path.write_text(json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})),
        lambda path: load_tokenizer(str(path.parent), path.parent / "config.json"),
    ),
}
DETERMINED = ("results", "tokenizer")
"""Whose written file is not complete: it must be refused by name, too."""


def read_damaged(case: str, damage: Callable[[bytes], bytes]) -> None:
    name, write, read = CASES[case]
    if case == "tokenizer":
        pytest.importorskip("transformers")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        (path.parent / "config.json").write_text("{}")
        write(path)
        path.write_bytes(damage(path.read_bytes()))
        refusal = None
        try:
            read(path)
        except (ValueError, TypeError, OSError) as error:
            refusal = str(error)
        # Of tokens and their index, either name tells where to look.
        assert refusal is None or str(path.with_suffix("")).removesuffix(".jsonl") in refusal


FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("case", CASES)
def test_what_was_written_is_read(case: str) -> None:
    if case not in DETERMINED:
        name, write, read = CASES[case]
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / name)
            read(Path(folder) / name)


@pytest.mark.parametrize("case", CASES)
def test_random_bytes(case: str) -> None:
    @FUZZ
    @given(st.binary(max_size=200))
    def check(content: bytes) -> None:
        read_damaged(case, lambda _: content)

    check()


@pytest.mark.parametrize("case", CASES)
def test_cut_files_and_flipped_bits(case: str) -> None:
    @FUZZ
    @given(st.floats(0, 1, exclude_max=True), st.booleans(), st.integers(0, 7))
    def check(place: float, cut: bool, bit: int) -> None:
        def damage(content: bytes) -> bytes:
            at = int(place * len(content))
            return content[:at] if cut else content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]

        read_damaged(case, damage)

    check()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("case", ["matrix", "report", "schedule", "mixture model", "prior", "mixture by hand"])
def test_any_json_in_the_place_of_any_field(case: str) -> None:
    """With a right checksum: what the checks of the content itself leave through."""

    @FUZZ
    @given(st.data(), JSON)
    def check(data: st.DataObject, value: Any) -> None:
        def damage(content: bytes) -> bytes:
            whole = json.loads(content)
            whole.pop("sha256", None)
            part = whole
            while True:
                key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
                if not (isinstance(part[key], (dict, list)) and part[key] and data.draw(st.booleans())):
                    break
                part = part[key]
            part[key] = value
            return json.dumps({**whole, "sha256": files._sha256(whole)} if "format" in whole else whole).encode()

        read_damaged(case, damage)

    check()


@pytest.mark.parametrize("case", ["matrix", "schedule", "mixture model", "fisher", "adam"])
def test_no_flipped_bit_changes_a_number_unseen(case: str, tmp_path: Path) -> None:
    """Every bit in 97 bytes spread over the file: refused, or what is read is what was written."""
    name, write, read = CASES[case]
    path = tmp_path / name
    write(path)
    content = path.read_bytes()
    if case == "schedule":

        def read(path: Path) -> Any:
            plan = schedule()
            plan.load(path)
            return plan.state_dict()

    def plain(result: Any) -> str:
        return repr(result.to_dict() if isinstance(result, InfluenceMatrix) else result)

    right = plain(read(path)) if case in ("matrix", "schedule", "adam") else None
    accepted = 0
    for number in range(97):
        at = number * len(content) // 97
        for bit in (0, 3, 5):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            try:
                result = read(path)
            except ValueError:
                continue
            accepted += 1
            assert right is None or plain(result) == right
    assert accepted < 97 * 3 / 2


def test_no_pickle_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pickle

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was about to be loaded")

    for case in CASES:  # what is imported on the way may itself inherit from Unpickler
        read_damaged(case, lambda content: content)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    evil = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."
    for case in CASES:
        read_damaged(case, lambda _: evil)
    path = tmp_path / "objects.npy"
    np.save(path, np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"objects\.npy: the dtype must be one of"):
        TokenSequences([path], 1)
    with pytest.raises(ValueError, match=r"P\.safetensors"):
        DiagonalFisher.load(_written(tmp_path / "P.safetensors", evil))


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_the_package_calls_nothing_that_loads_a_pickle() -> None:
    for file in Path(tikmix_fast.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "eval", "exec", "yaml.load"), f"{file}: {called}"
                if called in ("np.load", "numpy.load"):
                    assert not any(word.arg == "allow_pickle" for word in node.keywords), file
