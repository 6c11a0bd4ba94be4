"""The corpora: what is read, that it is always the same, and that no task's text is trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tikmix_fast.demo import corpora, sources
from tikmix_fast.demo.corpora import Sequences, gather

SMALL = {"domain_bytes": 60_000, "task_bytes": 16_000, "fewest_bytes": 4_000}


@pytest.fixture(scope="module")
def small() -> corpora.Corpora:
    return gather(**SMALL)


def long_lines(text: np.ndarray) -> set[str]:
    lines = (" ".join(line.split()) for line in bytes(text).decode().splitlines())
    return {line for line in lines if len(line) >= 40}


def test_sequences_cover_every_target_once() -> None:
    text = np.arange(23, dtype=np.uint8)
    sequences = Sequences(text, 5)
    items = [sequences[index] for index in range(len(sequences))]
    assert len(items) == 4
    assert torch.cat([item[1:] for item in items]).tolist() == list(range(1, 21))
    assert all(item[0] == item[1] - 1 and item.dtype == torch.int64 for item in items)
    assert torch.equal(sequences.all(), torch.stack(items))
    with pytest.raises(IndexError):
        sequences[4]


@pytest.mark.parametrize(("size", "length"), [(5, 5), (0, 1)])
def test_sequences_refuse_text_that_is_too_short(size: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"got {size} bytes"):
        Sequences(np.zeros(size, dtype=np.uint8), length)


def test_sequences_refuse_an_empty_length() -> None:
    with pytest.raises(ValueError, match="length must be an int of at least 1; got 0"):
        Sequences(np.zeros(5, dtype=np.uint8), 0)


def test_this_installation_has_every_source(small: corpora.Corpora) -> None:
    assert small.missing == {}
    assert len(small.domains) == 9
    assert len(small.steered) >= 4
    assert "sums" not in small.steered
    assert set(small.steered).isdisjoint(small.held_out)
    assert set(small.tasks) | set(small.domains) == set(small.sources)


def test_sizes_stay_within_the_budget(small: corpora.Corpora) -> None:
    assert all(4_000 <= len(text) <= 60_000 for text in small.domains.values())
    for task in small.tasks.values():
        assert all(4_000 <= len(text) <= 16_000 for text in (task.measure, task.report))


def test_gathering_twice_gives_the_same(small: corpora.Corpora) -> None:
    again = gather(**SMALL)
    for name, text in small.domains.items():
        assert np.array_equal(text, again.domains[name])
    for name, task in small.tasks.items():
        assert np.array_equal(task.measure, again.tasks[name].measure)
        assert np.array_equal(task.report, again.tasks[name].report)


def test_no_long_line_is_shared_between_reporting_measuring_and_training(small: corpora.Corpora) -> None:
    reported = set().union(*(long_lines(task.report) for task in small.tasks.values()))
    measured = set().union(*(long_lines(task.measure) for task in small.tasks.values()))
    trained = set().union(*(long_lines(text) for text in small.domains.values()))
    assert min(len(reported), len(measured), len(trained)) > 500
    assert not reported & measured
    assert not reported & trained
    assert not measured & trained


def test_sums_are_right_and_held_out_ones_are_others(small: corpora.Corpora) -> None:
    def read(text: np.ndarray) -> set[tuple[int, int]]:
        pairs = set()
        for line in bytes(text).decode().split("\n")[:-1]:
            if line:
                left, right, result = map(int, line.replace("=", "+").split("+"))
                assert left + right == result
                pairs.add((left, right))
        return pairs

    trained, task = read(small.domains["sums"]), small.tasks["sums"]
    assert len(trained) > 1000
    assert not trained & (read(task.report) | read(task.measure))


def test_a_missing_source_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise sources.MissingError("the package nowhere is not installed")

    few = (sources.Source("lost", "", absent), sources.Source("tiny", "", lambda: iter([("a", "b" * 50)])))
    monkeypatch.setattr(corpora, "DOMAINS", (*corpora.DOMAINS[-2:], *few))
    quick = [replace(task, steered=True) for task in corpora.TASKS if task.name in ("sums", "reference")]
    monkeypatch.setattr(corpora, "TASKS", (*quick, *few[:1]))
    gathered = gather(**SMALL, fewest=2)
    assert set(gathered.domains) == {"sums", "noise"}
    assert set(gathered.tasks) == {"sums", "reference"}
    assert gathered.missing["lost"] == "the package nowhere is not installed"
    assert "only 50 bytes" in gathered.missing["tiny"]
    with pytest.raises(ValueError, match=r"domains must be at least 4; this installation has 2 \(lost: the package"):
        gather(**SMALL)


def test_an_absent_package_is_missing() -> None:
    with pytest.raises(sources.MissingError, match="the package no_such_package is not installed"):
        next(sources._package_files("no_such_package", "*.py"))


def test_docstrings_are_those_of_the_source(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "documented"
    (package / "tests").mkdir(parents=True)
    text = "Explain it." * 40
    (package / "__init__.py").write_text(f'def one():\n    """{text}"""\ndef two():\n    """Short."""\n')
    (package / "broken.py").write_text("def :")
    (package / "tests" / "skipped.py").write_text(f'"""{text}"""')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert list(sources._docstrings("documented")) == [("documented/__init__.py:one", text)]
