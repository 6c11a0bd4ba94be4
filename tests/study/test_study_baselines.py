"""Each baseline on a problem whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from benchmarks.study.baselines.ado import ADO, at_least, fit_scaling_law, slope
from benchmarks.study.baselines.dga import DGA
from benchmarks.study.baselines.doge import DoGE
from benchmarks.study.baselines.fixed import half_and_half, natural, own_domains, uniform
from benchmarks.study.baselines.gradients import gradient, mirror_step
from benchmarks.study.baselines.odm import ODM, explore
from benchmarks.study.baselines.regmix import best_mixture, candidates
from benchmarks.study.baselines.tikmix_d import TikmixD
from benchmarks.study.training import Method, Study, Trainee

MakeStudy = Callable[..., Study]


def by_name(study: Study, method: Method) -> dict[str, float]:
    return dict(zip(study.problem.domains, method.start().tolist(), strict=True))


def trainee(study: Study) -> Trainee:
    return Trainee(study.main, study.problem.domains, study.uniform, "cpu")


def test_fixed_mixtures(make_study: MakeStudy) -> None:
    study = make_study()
    lengths = {name: len(text) for name, text in study.problem.domains.items()}
    assert list(lengths) == ["python", "docstrings", "fragments", "noise"]
    assert by_name(study, uniform(study)) == dict.fromkeys(lengths, 0.25)
    assert by_name(study, natural(study)) == pytest.approx({k: v / sum(lengths.values()) for k, v in lengths.items()})
    assert by_name(study, own_domains(study)) == {"python": 0.5, "docstrings": 0.5, "fragments": 0.0, "noise": 0.0}
    assert by_name(study, half_and_half(study)) == {
        "python": 0.375, "docstrings": 0.375, "fragments": 0.125, "noise": 0.125
    }  # fmt: skip


def test_odm_goes_to_the_arm_of_largest_reward_and_keeps_exploring(make_study: MakeStudy) -> None:
    method = ODM(make_study())
    losses = np.array([1.0, 2.0, 4.5, 3.0])
    for step in range(1, 401):
        method.observe(step, np.arange(4), losses)
    assert method.rewards == pytest.approx(np.exp(losses), rel=1e-9)
    floor = math.sqrt(math.log(4) / (4 * 400))
    assert method.weights.argmax() == 2
    assert method.weights[2] > 0.7
    assert method.weights.min() >= floor
    assert method.weights.sum() == pytest.approx(1)


def test_odm_by_hand() -> None:
    weights, floor = explore(np.array([1.0, 3.0]), 0.5, 100)
    assert floor == pytest.approx(math.sqrt(math.log(2) / 200))
    share = math.exp(1.5) / (math.exp(0.5) + math.exp(1.5))
    assert weights[1] == pytest.approx((1 - 2 * floor) * share + floor)


def test_odm_rewards_only_what_was_drawn(make_study: MakeStudy) -> None:
    method = ODM(make_study())
    method.observe(1, np.array([1, 1, 3]), np.array([1.0, 3.0, 0.5]))
    assert method.rewards == pytest.approx([0, 0.1 * math.exp(2.0), 0, 0.1 * math.exp(0.5)])


@pytest.mark.parametrize("law", [(2.0, 0.0, 0.4), (3.5, -1.0, 0.25), (1.0, 1.0, 0.6)])
def test_ado_recovers_known_power_laws(law: tuple[float, float, float]) -> None:
    a, e, alpha = law
    samples = 16.0 * np.arange(100, 3000, 10)
    losses = math.exp(e) + math.exp(a) / samples**alpha
    result = fit_scaling_law(samples, losses)
    a2, e2, alpha2 = result
    assert math.exp(e2) + np.exp(a2) / samples**alpha2 == pytest.approx(losses, rel=2e-3)
    expected = alpha * math.exp(a) / samples[-1] ** (alpha + 1)
    assert slope(result[None], samples[-1])[0] == pytest.approx(expected, rel=0.15)


def test_ado_fits_despite_outliers() -> None:
    samples = 16.0 * np.arange(100, 3000, 10)
    losses = math.exp(0.2) + math.exp(2.5) / samples**0.4
    losses[::40] *= 1.3
    a, e, alpha = fit_scaling_law(samples, losses)
    clean = math.exp(0.2) + math.exp(2.5) / samples**0.4
    assert math.exp(e) + np.exp(a) / samples**alpha == pytest.approx(clean, rel=1e-2)


def test_ado_prefers_the_domain_whose_loss_still_falls(make_study: MakeStudy) -> None:
    study = make_study()
    method = ADO(study)
    method._prior = method._shares = method._average = np.full(4, 0.25)
    for step in range(1, 25):
        falling = np.exp(0.2) + np.exp(3.0) / (step * 4) ** 0.5
        method.observe(step, np.arange(4), np.array([2.0, falling, 4.0, 3.0]))
    assert method.weights.argmax() == 1
    assert method.weights[1] > 0.4
    assert method.weights.min() > 0.005
    assert method.log[-1]["step"] == 24


def test_ado_slopes_and_least_probability_by_hand() -> None:
    laws = np.array([[1.0, 0.0, 0.5], [1.0, 0.0, 0.01]])
    assert slope(laws, 4.0) == pytest.approx([0.5 * math.e / 8, 0.05 * math.e / 4**1.01])
    assert at_least(np.array([0.6, 0.4, 0.0]), 0.01) == pytest.approx(np.array([0.6, 0.4, 0.01]) / 1.01)


def test_gradient_is_that_of_a_backward(make_study: MakeStudy) -> None:
    study = make_study()
    arm = trainee(study)
    rows = study.problem.domains["python"].all()[:3]
    result = gradient(arm.model, rows)
    assert all(each.grad is None for each in arm.model.parameters())
    arm.model.loss(rows).backward()
    torch.testing.assert_close(result, torch.cat([each.grad.flatten() for each in arm.model.parameters()]))


def test_mirror_step_by_hand() -> None:
    moved = mirror_step(np.array([0.2, 0.8]), np.array([1000.0, 999.0]), 2.0)
    assert moved == pytest.approx(np.array([0.2 * math.exp(2), 0.8]) / (0.2 * math.exp(2) + 0.8))


def test_dga_moves_to_the_domain_whose_gradient_is_the_targets(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    directions = dict(zip(map(id, study.problem.domains.values()), torch.eye(4), strict=True))
    calls: list[int] = []

    def draw(texts, rows, random):
        calls.append(len(texts))
        return [torch.full((rows, 1), float(position)) for position, _ in enumerate(texts)]

    def fake(model, sequences):
        # The first call of an update is the target's: the direction of domain 2.
        return directions_list[2] if len(sequences) > study.settings.dga_rows else directions_list[int(sequences[0, 0])]

    directions_list = list(directions.values())
    monkeypatch.setattr("benchmarks.study.baselines.dga.draw", draw)
    monkeypatch.setattr("benchmarks.study.baselines.dga.gradient", fake)
    method, arm = DGA(study), trainee(study)
    for arm.step in range(40):
        method.update(arm)
    updates = 40 // study.settings.update_every - 1
    assert calls == [2, 4] * updates
    # exp(rate * updates) against 1, smoothed.
    lead = math.exp(updates * study.settings.dga_rate)
    assert method.weights[2] == pytest.approx(lead / (lead + 3), rel=1e-3)
    assert method.weights[[0, 1, 3]] == pytest.approx(np.full(3, (1 - method.weights[2]) / 3))


def test_dga_and_doge_leave_noise_on_real_gradients(make_study: MakeStudy) -> None:
    study = make_study()
    arm, method = trainee(study), DGA(study)
    while arm.step < 24:
        before = {name: value.clone() for name, value in arm.model.state_dict().items()}
        changed = method.update(arm)
        assert all(torch.equal(value, before[name]) for name, value in arm.model.state_dict().items())
        if changed is not None:
            arm.sampler.set_weights(changed)
        arm.train_on()
    for result in (method.weights, DoGE(study).start()):
        assert result.sum() == pytest.approx(1)
        assert result[3] < 0.25
        assert result[3] == result.min()


def test_regmix_finds_the_best_of_a_known_quadratic() -> None:
    random = np.random.default_rng(0)
    natural_mixture = np.array([0.4, 0.3, 0.2, 0.1])
    best = np.array([0.15, 0.5, 0.1, 0.25])
    mixtures, pool = (candidates(natural_mixture, count, random) for count in (256, 20_000))
    result = best_mixture(mixtures, 2 + ((mixtures - best) ** 2).sum(1), pool)
    assert np.abs(result - best).sum() < 0.15
    assert np.abs(natural_mixture - best).sum() > 0.5


def test_regmix_candidates_are_mixtures_within_the_published_bounds() -> None:
    scarce = np.array([0.93, 0.05, 0.02])
    result = candidates(scarce, 3000, np.random.default_rng(1))
    assert result.shape == (3000, 3)
    assert result.sum(1) == pytest.approx(np.ones(3000))
    assert result[:, 2].max() == pytest.approx(15 * 0.02, abs=1e-3)
    assert (result == 0).any(1).mean() > 0.2  # weak strengths leave domains out
    plenty = np.array([0.4, 0.3, 0.2, 0.1])  # no bound is reached, so the mean is that of the Dirichlet distributions
    flat = np.sqrt(plenty) / np.sqrt(plenty).sum()
    assert candidates(plenty, 20_000, np.random.default_rng(1)).mean(0) == pytest.approx(flat, abs=0.01)


def test_tikmix_d_measures_at_the_boundaries_only_and_leaves_noise(make_study: MakeStudy) -> None:
    study = make_study()
    arm, method = trainee(study), TikmixD(study)
    changed = []
    while arm.step < study.main.steps:
        result = method.update(arm)
        if result is not None:
            changed.append(arm.step)
            arm.sampler.set_weights(result)
        arm.train_on()
    assert tuple(changed) == study.main.boundaries == (8, 16)
    assert [each["step"] for each in method.log] == changed
    assert np.shape(method.log[0]["influence"]) == (2, 4)
    assert arm.weights["noise"] == min(arm.weights.values())
