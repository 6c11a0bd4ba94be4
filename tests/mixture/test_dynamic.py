"""The schedule: due where it should be, changes that are worth it, supply that lasts, and resume at any point."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tikmix_fast import InfluenceMatrix, MixtureResult, MixtureSampler, tikmix_d
from tikmix_fast.mixture.schedule.dynamic import DynamicMixture

DOMAINS = ("web", "code", "books", "noise")
WARM_UP = {"web": 0.4, "code": 0.3, "books": 0.2, "noise": 0.1}


def matrix(values, error: float | None = 0.1, tasks=None) -> InfluenceMatrix:
    values = np.atleast_2d(np.array(values, dtype=float))
    stderr = None if error is None else np.full(values.shape, error)
    return InfluenceMatrix.from_values(values, stderr=stderr, domains=DOMAINS, tasks=tasks)


def fixed(weights) -> Callable[..., MixtureResult]:
    """A solver that always proposes the same."""

    def solver(measured, prior):
        weights_now = np.array(weights, dtype=float)
        result = tikmix_d(np.zeros(measured.shape), list(prior.values()), pareto=False)
        return MixtureResult(**{**vars(result), "weights": weights_now, "domains": None})

    return solver


def drive(schedule: DynamicMixture, measure: Callable[[int], InfluenceMatrix]) -> list[int]:
    met = []
    for step in range(schedule.steps):
        if schedule.due(step):
            schedule.update(step, measure(step))
            met.append(step)
    return met


@pytest.mark.parametrize(
    ("options", "met"),
    [
        ({}, [20, 40, 60, 80]),
        ({"stages": 2}, [50]),
        ({"stages": 3}, [33, 66]),
        ({"stages": 1}, []),
        ({"boundaries": (0, 7, 99)}, [0, 7, 99]),
        ({"boundaries": ()}, []),
    ],
)
def test_updates_are_due_at_the_boundaries(options, met: list[int]) -> None:
    schedule = DynamicMixture(DOMAINS, 100, **options)
    assert schedule.weights == dict.fromkeys(DOMAINS, 0.25)
    assert drive(schedule, lambda step: matrix([1, 2, 3, 4])) == met == list(schedule.boundaries)
    assert [(each.stage, each.step) for each in schedule.history] == list(enumerate(met, 1))


def test_a_boundary_that_was_passed_is_met_late_and_two_at_once() -> None:
    schedule = DynamicMixture(DOMAINS, 100)
    assert [step for step in (19, 20, 23, 99, 100) if schedule.due(step)] == [20, 23, 99]
    decision = schedule.update(47, matrix([1, 2, 3, 4]))
    assert (decision.stage, schedule.stage) == (2, 2)
    assert not schedule.due(59)
    assert schedule.due(60)


def test_the_solution_is_tikmix_ds_from_the_mixture_in_use() -> None:
    schedule = DynamicMixture(DOMAINS, 100, warm_up=WARM_UP, options={"diversity": 0.4, "smoothing": 0.2})
    prior = WARM_UP
    for step, values in ((20, [[1, 2, 3, -1], [2, 1, 1, 0]]), (40, [[3, 1, 0, 0], [1, 1, 2, 0]])):
        expected = tikmix_d(matrix(values), prior, diversity=0.4, smoothing=0.2)
        decision = schedule.update(step, matrix(values))
        assert decision.weights == decision.solved == schedule.weights == expected.as_dict()
        assert decision.changed
        assert (decision.fun, decision.terms, decision.message) == (expected.fun, expected.terms, expected.message)
        prior = expected.as_dict()


def test_columns_are_matched_by_name() -> None:
    names = ("noise", "books", "code", "web")
    one, other = (DynamicMixture(DOMAINS, 10, 2, warm_up=WARM_UP, minimum_gain=0.5) for _ in range(2))
    values = np.array([[1.0, 2.0, 4.0, 0.5], [3.0, 1.0, 2.0, 0.0]])
    here = one.update(5, matrix(values))
    turned = InfluenceMatrix.from_values(values[:, ::-1], stderr=np.full((2, 4), 0.1), domains=names)
    there = other.update(5, turned)
    assert there.weights == pytest.approx(here.weights, abs=1e-9)
    assert list(there.weights) == list(DOMAINS)
    assert there.gain.total == pytest.approx(here.gain.total)
    assert np.array_equal(there.influence, here.influence)


def test_a_gain_below_the_minimum_changes_nothing() -> None:
    values = [[1.0, 2.0, 3.0, -1.0]]
    free = DynamicMixture(DOMAINS, 100, warm_up=WARM_UP).update(20, matrix(values))
    excess = free.gain.excess
    assert excess > 1
    for minimum, changed in ((0.99 * excess, True), (1.01 * excess, False)):
        schedule = DynamicMixture(DOMAINS, 100, warm_up=WARM_UP, minimum_gain=minimum)
        decision = schedule.update(20, matrix(values))
        assert decision.changed == changed
        assert decision.solved == free.solved
        assert schedule.weights == decision.weights == (free.solved if changed else WARM_UP)
        assert decision.reason.startswith("changed: " if changed else "kept: ")
        assert f"the gain is {excess:.3g} standard errors beyond noise" in decision.reason


def test_unknown_errors_and_a_failed_solver_and_no_step_keep_the_mixture() -> None:
    schedule = DynamicMixture(DOMAINS, 100, warm_up=WARM_UP, minimum_gain=1.0)
    decision = schedule.update(20, matrix([1, 2, 3, 4], error=None))
    assert (decision.changed, decision.weights) == (False, WARM_UP)
    assert "error of the gain is unknown" in decision.reason

    def failing(measured, prior):
        result = tikmix_d(measured, prior)
        return MixtureResult(**{**vars(result), "success": False, "status": 1, "message": "it rained"})

    decision = DynamicMixture(DOMAINS, 100, warm_up=WARM_UP, solver=failing).update(20, matrix([1, 2, 3, 4]))
    assert (decision.changed, decision.weights) == (False, WARM_UP)
    assert decision.reason == "kept: the solver failed: it rained"

    decision = DynamicMixture(DOMAINS, 100, solver=fixed([0.25] * 4)).update(20, matrix([1, 2, 3, 4]))
    assert not decision.changed
    assert "the mixture in use" in decision.reason


def test_a_solver_of_ones_own_gets_the_matrix_and_the_prior_by_name() -> None:
    seen = []

    def solver(measured, prior):
        seen.append((measured, prior))
        return tikmix_d(measured, prior, diversity=0.1)

    schedule = DynamicMixture(DOMAINS, 100, warm_up=WARM_UP, solver=solver)
    given = matrix([1, 2, 3, 4])
    decision = schedule.update(20, given)
    assert seen == [(given, WARM_UP)]
    assert decision.weights == tikmix_d(given, WARM_UP, diversity=0.1).as_dict()


def test_ranks_are_compared_with_the_last_measured_stage_by_task() -> None:
    schedule = DynamicMixture(DOMAINS, 100)
    assert schedule.update(20, matrix([[1, 2, 3, 4], [1, 2, 3, 4]], tasks=["qa", "maths"])).ranks is None
    ranks = schedule.update(40, matrix([[4, 3, 2, 1], [1, 2, 3, 4]], tasks=["maths", "law"])).ranks
    assert ranks.tasks == ("maths",)
    assert (ranks.mean_spearman, ranks.mean_kendall) == (-1, -1)
    assert math.isnan(ranks.mean_ceiling)
    ranks = schedule.update(60, matrix([[4, 3, 1, 2], [1, 2, 3, 5]], tasks=["maths", "law"])).ranks
    assert ranks.spearman == pytest.approx((0.8, 1.0))
    assert ranks.kendall == pytest.approx((2 / 3, 1.0))


def test_a_stable_stage_without_gain_skips_the_next_and_only_that() -> None:
    noisy = matrix([1.0, 1.3, 1.2, 0.9], error=1.0)
    schedule = DynamicMixture(DOMAINS, 100, stages=10, warm_up=WARM_UP, minimum_gain=1.0, skip_agreement=0.9)
    # 10 is the first, without ranks to compare; 20 agrees with it and skips 30; 40 agrees with 20 and skips 50.
    assert drive(schedule, lambda step: noisy) == [10, 20, 40, 60, 80]
    assert [each.skips_next for each in schedule.history] == [False, True, True, True, True]
    assert "the ranks are those of stage 1, so the next boundary is skipped" in schedule.history[1].reason
    assert schedule.weights == WARM_UP


def test_no_skip_where_ranks_moved_or_the_gain_is_real() -> None:
    moving = [matrix([1.0, 1.3, 1.2, 0.9], error=1.0), matrix([1.3, 1.0, 0.9, 1.2], error=1.0)]
    schedule = DynamicMixture(DOMAINS, 100, warm_up=WARM_UP, minimum_gain=1.0, skip_agreement=0.9)
    assert drive(schedule, lambda step: moving[step // 20 % 2]) == [20, 40, 60, 80]
    schedule = DynamicMixture(
        DOMAINS, 100, warm_up=WARM_UP, minimum_gain=1.0, skip_agreement=0.9, options={"smoothing": 0.9}
    )
    assert drive(schedule, lambda step: matrix([1, 2, 3, 4], error=0.001)) == [20, 40, 60, 80]
    assert all(each.changed for each in schedule.history)


def test_a_supply_lasts_to_the_end_of_the_run() -> None:
    """Whatever is asked for: tokens drawn of a domain never exceed its epochs, and a kept mixture always fits."""
    supply = {"web": math.inf, "code": 300.0, "books": 100.0, "noise": math.inf}
    schedule = DynamicMixture(
        DOMAINS, 100, supply=supply, run_tokens=1000.0, max_epochs=2.0, options={"diversity": 0.1}
    )
    assert schedule.caps(0) == pytest.approx({"web": 1, "code": 0.6, "books": 0.2, "noise": 1})
    assert schedule.weights == pytest.approx({"web": 0.8 / 3, "code": 0.8 / 3, "books": 0.2, "noise": 0.8 / 3})
    drawn = dict.fromkeys(DOMAINS, 0.0)
    for step in range(100):
        if schedule.due(step):
            greedy = {20: [0, 0, 9, 0], 40: [0, 9, 0, 0], 60: [0, 0, 9, 0], 80: [0, 9, 9, 0]}[step]
            caps = schedule.caps(step)
            decision = schedule.update(step, matrix(greedy))
            assert all(decision.weights[name] <= caps[name] + 1e-9 for name in DOMAINS)
        for name, weight in schedule.weights.items():
            drawn[name] += 10 * weight
    with pytest.raises(ValueError, match="at least that of the last decision, 80; got 79"):
        schedule.caps(79)
    assert drawn["books"] == pytest.approx(200)
    assert 400 < drawn["code"] <= 600 + 1e-6


def test_what_was_spared_may_be_spent() -> None:
    schedule = DynamicMixture(["a", "b"], 10, 2, warm_up={"a": 1.0, "b": 0.0}, supply=[math.inf, 3.0], run_tokens=10.0)
    assert schedule.caps(0)["b"] == pytest.approx(0.3)
    assert schedule.caps(5)["b"] == pytest.approx(0.6)


def test_rounding_never_takes_supply_from_the_mixture_in_use() -> None:
    schedule = DynamicMixture(DOMAINS, 1000, warm_up=WARM_UP, supply=list(WARM_UP.values()), run_tokens=1.0)
    for step in range(1000):
        caps = schedule.caps(step)
        assert all(weight * (1 - 1e-15) <= caps[name] < weight + 1e-9 for name, weight in WARM_UP.items())


def test_it_drives_a_sampler() -> None:
    sampler = MixtureSampler(dict.fromkeys(DOMAINS, 1000), WARM_UP)
    schedule = DynamicMixture(DOMAINS, 400, 2, warm_up=WARM_UP)
    draws = iter(sampler)
    for step in range(schedule.steps):
        if schedule.due(step):
            sampler.set_weights(schedule.update(step, matrix([1, 2, 3, -1])).weights)
        next(draws)
    expected = 200 * np.array(list(WARM_UP.values())) + 200 * np.array(list(schedule.weights.values()))
    assert np.abs(sampler.counts - expected).max() < 2


VALUES = st.lists(st.lists(st.floats(-3, 3), min_size=4, max_size=4), min_size=2, max_size=2)
SEQUENCES = st.lists(st.tuples(VALUES, st.sampled_from([None, 0.0, 0.3, 2.0]), st.booleans()), min_size=1, max_size=6)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(SEQUENCES, st.sampled_from([0.0, 1.0]), st.sampled_from([None, 0.0]), st.booleans(), st.integers(0, 6))
def test_any_run_is_on_the_simplex_and_resumes_anywhere(measurements, minimum, agreement, scarce, stop) -> None:
    def make() -> DynamicMixture:
        limits = {"supply": [9, 3, 2, 1], "run_tokens": 10} if scarce else {}
        skip = agreement if minimum else None
        return DynamicMixture(DOMAINS, 70, 7, warm_up=WARM_UP, minimum_gain=minimum, skip_agreement=skip, **limits)

    def run(schedule: DynamicMixture, start: int, end: int) -> None:
        for step in range(start, end):
            if not schedule.due(step):
                continue
            values, error, unmeasured = measurements[step // 10 % len(measurements)]
            values = np.array(values)
            values[:, 2] = np.nan if unmeasured else values[:, 2]
            before, caps = schedule.weights, schedule.caps(step)
            decision = schedule.update(step, matrix(values, error))
            numbers = np.array(list(decision.weights.values()))
            assert (numbers >= 0).all()
            assert abs(numbers.sum() - 1) < 1e-9
            assert all(decision.weights[name] <= caps[name] + 1e-9 for name in DOMAINS)
            if not decision.changed:
                assert decision.weights == before == schedule.weights
            if decision.skips_next:
                assert not decision.changed
                assert not schedule.due(10 * (decision.stage + 1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, first, second = make(), make(), make()
        run(whole, 0, 70)
        run(first, 0, 10 * stop + 5)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        run(second, 10 * stop + 5, 70)
    assert second.state_dict() == whole.state_dict()
    assert second.weights == whole.weights


def test_a_file_brings_everything_back(tmp_path) -> None:
    schedule = DynamicMixture(DOMAINS, 100, warm_up=WARM_UP)
    with pytest.warns(UserWarning, match="task 'maths': the row's max is -1"):
        schedule.update(20, matrix([[1, 2, np.nan, -4], [-1, -2, np.nan, -3]], tasks=["qa", "maths"]))
    schedule.update(40, matrix([1, 2, 3, 4], error=None, tasks=["qa"]))
    path = schedule.save(tmp_path / "schedule.json")
    again = DynamicMixture(DOMAINS, 100, warm_up=WARM_UP)
    again.load(path)
    assert again.state_dict() == schedule.state_dict()
    first = again.history[0]
    assert np.isnan(first.influence[:, 2]).all()
    assert first.influence[1].tolist()[:2] == [-1, -2]
    assert first.warnings
    assert math.isnan(again.history[1].gain.stderr)
    assert again.history[1].ranks.tasks == ("qa",)
    assert (again.stage, again.due(40), again.due(60)) == (2, False, True)


def test_an_update_that_fails_leaves_the_schedule_as_it_was() -> None:
    def broken(measured, prior):
        prior.clear()
        raise RuntimeError("no")

    schedule = DynamicMixture(DOMAINS, 100, warm_up=WARM_UP, minimum_gain=0.5)
    other = DynamicMixture(DOMAINS, 100, warm_up=WARM_UP, solver=broken)
    schedule.update(20, matrix([1, 2, 3, 4]))
    before = schedule.state_dict()
    foreign = InfluenceMatrix.from_values([[1.0, 2.0]], domains=["web", "code"])
    for step, bad, error, message in (
        (20, matrix([1, 2, 3, 4]), ValueError, "step must be one at which an update is due; got 20: the next is 40"),
        (True, matrix([1, 2, 3, 4]), ValueError, "step must be an int"),
        (40.0, matrix([1, 2, 3, 4]), ValueError, "step must be an int"),
        (100, matrix([1, 2, 3, 4]), ValueError, "step must be one"),
        (40, [[1.0, 2.0, 3.0, 4.0]], ValueError, "minimum_gain needs standard errors: pass an InfluenceMatrix"),
        (40, foreign, ValueError, r"matrix must have the domains of the schedule, \('web', .* got \('web', 'code'\)"),
        (40, matrix([1, np.inf, 3, 4]), ValueError, "matrix must be finite"),
        (40, matrix([[1, np.nan, 3, 4], [1, 2, 3, 4]]), ValueError, "a domain must be measured for all tasks"),
    ):
        with pytest.raises(error, match=message):
            schedule.update(step, bad)
        assert schedule.state_dict() == before
    with pytest.raises(RuntimeError, match="no"):
        other.update(20, matrix([1, 2, 3, 4]))
    assert (other.weights, other.history) == (WARM_UP, ())
    assert schedule.update(40, matrix([4, 3, 2, 1])).stage == 2


@pytest.mark.parametrize(
    ("solver", "error", "message"),
    [
        (lambda measured, prior: prior, TypeError, "solver must return a MixtureResult; got dict"),
        (fixed([0.5, 0.5]), ValueError, "solver must return weights of the domains"),
        (
            fixed([0.2, 0.2, 0.3, 0.3]),
            ValueError,
            r"solver must keep within the supply; got 0.3 for domain 'books', which lasts for 0.1.*caps\(step\)",
        ),
    ],
)
def test_what_a_solver_returns_is_checked(solver, error, message: str) -> None:
    schedule = DynamicMixture(
        DOMAINS, 100, solver=solver, supply={**dict.fromkeys(DOMAINS, math.inf), "books": 1}, run_tokens=10
    )
    with pytest.raises(error, match=message):
        schedule.update(20, matrix([1, 2, 3, 4]))
    assert schedule.history == ()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"domains": "web"}, TypeError, "domains must be a sequence of strings; got 'web'"),
        ({"domains": []}, ValueError, "domains must be one or more different non-empty strings"),
        ({"domains": ["a", "a"]}, ValueError, "domains must be one or more different"),
        ({"steps": 0}, ValueError, "steps must be an int of at least 1; got 0"),
        ({"steps": 1e4}, ValueError, "steps must be an int of at least 1; got 10000.0"),
        ({"stages": 101}, ValueError, "stages must be an int from 1 to 100; got 101"),
        ({"boundaries": (5, 5)}, ValueError, "boundaries must rise and lie below steps, 100"),
        ({"boundaries": (5, 100)}, ValueError, "boundaries must rise and lie below steps, 100"),
        ({"boundaries": (-1,)}, ValueError, "boundaries must be an int of at least 0"),
        ({"warm_up": {"web": 1.0}}, ValueError, "warm_up must name"),
        ({"warm_up": [0.5, 0.5, 0.5, 0.5]}, ValueError, "warm_up must be at least 0 and sum to 1"),
        ({"minimum_gain": -1}, ValueError, "minimum_gain must be at least 0"),
        ({"minimum_gain": "much"}, TypeError, "minimum_gain must be a number"),
        ({"skip_agreement": 0.9}, ValueError, "skip_agreement needs a minimum_gain above 0"),
        ({"skip_agreement": 2, "minimum_gain": 1}, ValueError, "skip_agreement must be at least 0 and at most 1"),
        ({"solver": "slsqp"}, TypeError, "solver must be callable"),
        ({"solver": tikmix_d, "options": {}}, ValueError, "give either a solver or options"),
        ({"options": {"diversty": 1}}, TypeError, "options must be keyword arguments of tikmix_d: .*'diversty'"),
        ({"options": {"diversity": -1}}, ValueError, "diversity must be at least 0"),
        ({"options": {"floor": 0.3}}, ValueError, "floor must sum to at most 1"),
        ({"options": {"cap": {"video": 0.3}}}, ValueError, "unknown .*'video'"),
        ({"options": {"max_epochs": 4}}, ValueError, "options must not hold 'max_epochs'"),
        ({"supply": [1, 1, 1, 1]}, ValueError, "supply and run_tokens must be given together"),
        ({"supply": [1, 1, 1, 1], "run_tokens": 8}, ValueError, "supply must last for the run; got 0.5 of run_tokens"),
        ({"supply": [1, 1], "run_tokens": 1}, ValueError, "supply must have one number per domain"),
        ({"supply": [9, 9, 9, 1], "run_tokens": 20, "max_epochs": 0}, ValueError, "max_epochs must be above 0"),
        (
            {"supply": [9, 9, 9, 1], "run_tokens": 20, "warm_up": WARM_UP},
            ValueError,
            "warm_up must leave a supply to the end of the run; got 0.1 for domain 'noise', which lasts for 0.05",
        ),
    ],
)
def test_mistakes_are_told_before_training_begins(arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        DynamicMixture(**{"domains": DOMAINS, "steps": 100, **arguments})


def test_caps_are_of_steps_of_the_run() -> None:
    with pytest.raises(ValueError, match="step must be below steps, 100; got 100"):
        DynamicMixture(DOMAINS, 100).caps(100)


def damaged(state, path, value):
    state = json.loads(json.dumps(state))
    target = state
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return state


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "other", "state must be that of a DynamicMixture"),
        (["version"], 2, "state must be that of a DynamicMixture"),
        (["domains"], ["web"], "domains of the state must be that of the schedule"),
        (["steps"], 200, "steps of the state must be that of the schedule, 100; got 200: make the schedule with"),
        (["boundaries"], [50], "boundaries of the state"),
        (["warm_up"], {**WARM_UP, "web": 0.3}, "warm_up of the state"),
        (["history"], None, "history of the state must be as state_dict returns it"),
        (["history", 0], 3, "history of the state must be as state_dict returns it"),
        (["history", 0], {}, "history of the state must be as state_dict returns it; got KeyError"),
        (["history", 0, "gain"], {"total": 1.0}, "history of the state must be as state_dict returns it"),
        (["history", 0, "influence"], [[1.0]], r"influence must have shape \(1, 4\)"),
        (["history", 0, "weights", "web"], 5.0, "weights must be at least 0 and sum to 1"),
        (["history", 0, "solved"], {"a": 1.0}, "solved must have the domains of weights"),
        (["history", 0, "stage"], 2, "history of the state must be at rising boundaries; got step 20, stage 2"),
        (["history", 1, "step"], 20, "history of the state must be at rising boundaries"),
        (["history", 1, "step"], 100, "history of the state must be at rising boundaries"),
        (
            ["history", 0, "changed"],
            False,
            "weights of the state must follow from its decisions; got others at step 20",
        ),
    ],
)
def test_a_damaged_or_foreign_state_is_refused(path, value, message: str, tmp_path) -> None:
    schedule = DynamicMixture(DOMAINS, 100, warm_up=WARM_UP)
    schedule.update(20, matrix([1, 2, 3, 4]))
    schedule.update(40, matrix([4, 2, 3, 1]))
    state = schedule.state_dict()
    other = DynamicMixture(DOMAINS, 100, warm_up=WARM_UP)
    other.update(20, matrix([1, 1, 3, 4]))
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(damaged(state, path, value))
    (tmp_path / "bad.json").write_text(json.dumps(damaged(state, path, value)))
    with pytest.raises(ValueError, match=f"bad.json: .*{message}"):
        other.load(tmp_path / "bad.json")
    assert other.state_dict() == before


def test_what_is_no_state_at_all_is_refused(tmp_path) -> None:
    schedule = DynamicMixture(DOMAINS, 100)
    with pytest.raises(TypeError, match="state must be a mapping"):
        schedule.load_state_dict([])
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(ValueError, match=r"torn\.json: is not JSON, or cut short: Expecting"):
        schedule.load(tmp_path / "torn.json")
    with pytest.raises(FileNotFoundError):
        schedule.load(tmp_path / "missing.json")


def test_arrays_will_do_where_no_error_is_asked_for() -> None:
    decision = DynamicMixture(DOMAINS, 100, warm_up=WARM_UP).update(20, [[1.0, 2.0, 3.0, -1.0]])
    assert decision.weights == tikmix_d(matrix([1, 2, 3, -1]), WARM_UP).as_dict()
    with pytest.raises(ValueError, match="values must"):
        DynamicMixture(DOMAINS, 100).update(20, [[1.0, 2.0]])
