"""Every baseline computes what it is compared for, and one that does not is caught before it is timed."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.forced import instruction_set_methods
from tikmix_fast.benchmarking import memory
from tikmix_fast.benchmarking.baselines import PLAIN, Answer, Layer, Method, exact_methods
from tikmix_fast.benchmarking.machine import MachineRates, measure_rates
from tikmix_fast.benchmarking.ops import CASES, Case, check_methods, make_layer, measure_case
from tikmix_fast.ops.backends import cpu

RATES = MachineRates({"float32": 1e11, "bfloat16": 2e11}, {}, 1e10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 24, 16, 3, 2), (300, 200, 40, 5, 1), (8, 8, 8, 6, 4)])
def test_every_method_is_right(dtype: str, shape: tuple[int, ...]) -> None:
    checked, skipped = check_methods(make_layer(Case(*shape, dtype)), {**exact_methods(), **instruction_set_methods()})
    assert not [name for name in skipped if "oneDNN" not in name]
    assert checked[PLAIN].errors.error is None
    assert checked["tikmix_fast, influence only"].errors.total_error is None
    assert all(each.errors.error is not None for name, each in checked.items() if "weight gradient" not in name)
    assert all(each.errors.total_error is not None for name, each in checked.items() if "influence only" not in name)


def test_odd_sizes_are_skipped_with_the_reason() -> None:
    checked, skipped = check_methods(make_layer(Case(40, 7, 9, 2, 2, "float32")), exact_methods())
    assert list(skipped) == ["grouped_mm + GEMM"]
    assert "multiple of 16 bytes" in skipped["grouped_mm + GEMM"]
    assert "tikmix_fast" in checked


def wrong_by(change: str) -> Method:
    def prepare(layer: Layer):
        run = exact_methods()["tikmix_fast"].prepare(layer)

        def changed() -> Answer:
            values, total = run()
            if change == "values":
                values = values.flip(1)
            elif change == "nan":
                values = values.clone().fill_(torch.nan)
            else:
                total = total + 1e-2 * total.abs().max()
            return Answer(values, total)

        return changed

    return Method(prepare)


@pytest.mark.parametrize(("change", "what"), [("values", "influence"), ("nan", "influence"), ("total", "total")])
def test_a_wrong_method_is_caught(change: str, what: str) -> None:
    layer = make_layer(Case(64, 24, 16, 3, 2, "float32"))
    with pytest.raises(AssertionError, match=f"broken is wrong: {what}: "):
        check_methods(layer, {"broken": wrong_by(change)})


def test_forcing_an_instruction_set_leaves_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(Case(16, 8, 8, 2, 1, "float32"))
    monkeypatch.delenv(cpu.INSTRUCTION_SET_VARIABLE, raising=False)
    methods = instruction_set_methods()
    forced = [name for name in cpu.instruction_sets() if f"tikmix_fast, {name}" in methods]
    assert forced == cpu.instruction_sets()
    methods[f"tikmix_fast, {forced[-1]}"].prepare(layer)()
    assert cpu.INSTRUCTION_SET_VARIABLE not in os.environ
    monkeypatch.setenv(cpu.INSTRUCTION_SET_VARIABLE, forced[0])
    methods[f"tikmix_fast, {forced[-1]}"].prepare(layer)()
    assert os.environ[cpu.INSTRUCTION_SET_VARIABLE] == forced[0]


def test_domains_are_uneven_and_the_same_every_time() -> None:
    for case in CASES[:1]:
        layer = make_layer(case)
        sizes = layer.offsets.diff()
        assert layer.offsets[-1] == case.rows
        assert sizes.max() > 2 * sizes.min()
        assert torch.equal(layer.offsets, make_layer(case).offsets)


def test_counts_of_work() -> None:
    case = Case(10, 3, 5, 2, 4, "bfloat16")
    assert case.useful_flops == 2 * 10 * 15 + 2 * 2 * 4 * 15
    assert case.least_bytes == 2 * (10 * 8 + 4 * 15) + 4 * 15
    assert case.plain_flops == 300
    assert case.plain_bytes == 2 * (80 + 15)


def test_rows_hold_what_was_measured() -> None:
    said: list[str] = []
    case = Case(64, 24, 16, 3, 2, "float32")
    result = measure_case(case, RATES, rounds=6, weigh=False, tell=said.append)
    rows = {row["method"]: row for row in result["rows"]}
    ours, plain = rows["tikmix_fast"], rows[PLAIN]
    assert (plain["ratio"], plain["gives"], plain["ours"]) == (1, ["total"], False)
    assert (ours["gives"], ours["ours"], ours["rounds"]) == (["influence", "total"], True, 6)
    assert ours["ratio"] == pytest.approx(ours["seconds"] / plain["seconds"])
    assert ours["flops_per_second"] == pytest.approx(case.useful_flops / ours["seconds"])
    assert ours["peak_share"] == pytest.approx(case.useful_flops / ours["seconds"] / 1e11)
    assert plain["bandwidth_share"] == pytest.approx(case.plain_bytes / plain["seconds"] / 1e10)
    assert ours["error"] < 1e-7
    assert ours["scratch_bytes"] is None
    assert result["tokens_per_domain"] == pytest.approx(64 / 3)
    assert any("checking" in each for each in said)


NO_MEMORY = pytest.mark.skipif(memory.why_not() is not None, reason=f"peak memory: {memory.why_not()}")


@NO_MEMORY
def test_peak_growth_is_that_of_the_call() -> None:
    kept = [torch.ones(2**23)]  # 32 MiB that exist before
    growth = memory.peak_growth(lambda: kept.append(torch.ones(2**24)))["growth"] / 2**20
    assert 60 < growth < 80


@NO_MEMORY
@pytest.mark.slow
def test_memory_of_a_method_is_that_of_its_scratch() -> None:
    """16 domains of 512 x 512 float32 stacked take 16 MiB; the plain product needs nothing but its result."""
    request = {"case": vars(Case(512, 512, 512, 16, 2, "float32")), "threads": 1}
    stacked, plain = (
        memory.in_fresh_process("tikmix_fast.benchmarking.ops", {**request, "method": name})["growth"] / 2**20
        for name in ("torch, stacked + GEMM", PLAIN)
    )
    assert 15 < stacked < 24
    assert plain < 5


def test_a_process_that_fails_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)python -m no_such_module failed: .*No module named"):
        memory.in_fresh_process("no_such_module", {})


def test_rates_are_plausible() -> None:
    rates = measure_rates(("float32",), seconds=0.2)
    assert 1e8 < rates.flops["float32"] < 1e15
    assert 1e8 < rates.bandwidth < 1e13
    assert rates.found_by["float32"]
