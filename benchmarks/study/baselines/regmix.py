"""RegMix (arXiv 2407.01492): many small proxy runs, a regression on their losses, and the best of many candidates."""

from __future__ import annotations

import dataclasses
import json

import lightgbm
import numpy as np

from benchmarks.study import counting
from benchmarks.study.training import Array, Method, Study, Trainee
from tikmix_fast import files
from tikmix_fast.demo.demonstration import task_losses

__all__ = ["RegMix", "best_mixture", "candidates", "proxy_losses"]

_TEMPERATURE = 0.5
_STRENGTHS = np.logspace(np.log10(0.1), np.log10(5.0), 15)
_LEAST, _MOST = 2e-4, 15  # smaller weights become zero; larger multiples of the natural weight are not drawn
_SIMULATED, _AVERAGED = 100_000, 128
_FORMAT = "tikmix_fast.study.proxies"


class RegMix(Method):
    """Fit LightGBM to ``count`` proxy runs and use the mean of the 128 candidates with the best predictions.

    Settings are those of the authors' code; the target is the mean loss of the steered tasks. One setting differs: with
    20 rows per leaf (LightGBM's default) less than 40 runs allow no tree at all, so a leaf needs a tenth of the runs.
    """

    def __init__(self, study: Study, count: int) -> None:
        mixtures, losses = proxy_losses(study, count)
        random = np.random.default_rng([study.seed, 5])
        pool = candidates(study.problem.natural, _SIMULATED, random)
        super().__init__(best_mixture(mixtures, losses.mean(1), pool))
        settings = study.settings.proxy
        model = settings.model
        evaluated = sum(min(settings.curve_rows, len(text)) for text in study.problem.steered.values())
        self.flops = float(
            count
            * (
                counting.training(model, settings.steps * settings.batch * model.length)
                + counting.forward(model, evaluated * study.settings.main.model.length)
            )
        )


def candidates(natural: Array, count: int, random: np.random.Generator) -> Array:
    """Draw mixtures [count, m] from Dirichlet distributions of many strengths around the flattened natural mixture."""
    flat = natural**_TEMPERATURE / (natural**_TEMPERATURE).sum()
    mixtures = np.empty((0, len(natural)))
    while len(mixtures) < count:
        drawn = random.standard_gamma(random.choice(_STRENGTHS, (2 * count, 1)) * flat)
        drawn = drawn[drawn.sum(1) > 0]
        drawn /= drawn.sum(1, keepdims=True)
        drawn = drawn[(drawn <= np.minimum(_MOST * natural, 1)).all(1)]
        drawn = np.round(np.where(drawn < _LEAST, 0, drawn) / _LEAST) * _LEAST
        mixtures = np.concatenate([mixtures, drawn / drawn.sum(1, keepdims=True)])
    return mixtures[:count]


def proxy_losses(study: Study, count: int) -> tuple[Array, Array]:
    """Train proxies and return their mixtures [count, m] and their losses [count, n] on the steered tasks.

    Each finished proxy is saved in the study's folder: arms share proxies, and a killed run resumes.
    """
    settings = dataclasses.replace(study.settings.proxy, seed=study.seed)
    mixtures = candidates(study.problem.natural, max(study.settings.proxies), np.random.default_rng([study.seed, 4]))
    path = study.folder / f"proxies-{study.seed}.json"
    made_with = {"proxy": dataclasses.asdict(settings), "fingerprint": study.problem.fingerprint}
    made_with = json.loads(json.dumps({**made_with, "mixtures": mixtures.tolist()}))
    done: list[list[float]] = []
    if path.exists():
        before = files.read_json(path, _FORMAT, sealed=True)
        # A larger count starts with the proxies of a smaller one, so a study with more proxies continues this file.
        both = min(len(before["mixtures"]), len(mixtures))
        same = all(before[part] == made_with[part] for part in ("proxy", "fingerprint"))
        if not same or before["mixtures"][:both] != made_with["mixtures"][:both]:
            raise ValueError(f"{path} holds proxies of other settings or texts: give this study its own folder")
        done = before["losses"]
    while len(done) < count:
        arm = Trainee(settings, study.problem.domains, mixtures[len(done)], study.settings.device)
        while arm.step < settings.steps:
            arm.train_on()
        done.append(list(task_losses(arm.model, study.problem.steered, settings.curve_rows).values()))
        files.write_sealed_json(path, {"format": _FORMAT, **made_with, "losses": done})
    return mixtures[:count], np.array(done[:count])


def best_mixture(mixtures: Array, losses: Array, pool: Array) -> Array:
    """Return the mean of the candidates in ``pool`` with the smallest predicted loss."""
    held_out = max(2, len(losses) // 5)  # decide when to stop
    stopping = lightgbm.Dataset(mixtures[:held_out], losses[:held_out])
    settings = {
        "objective": "regression", "learning_rate": 0.01, "seed": 42, "verbosity": -1, "num_threads": 1,
        "deterministic": True, "min_data_in_leaf": min(20, max(1, len(losses) // 10)), "feature_pre_filter": False,
    }  # fmt: skip
    model = lightgbm.train(
        settings, lightgbm.Dataset(mixtures[held_out:], losses[held_out:], params=settings), num_boost_round=1000,
        valid_sets=[stopping], callbacks=[lightgbm.early_stopping(3, verbose=False)],
    )  # fmt: skip
    best = np.argsort(np.asarray(model.predict(pool)), kind="stable")[:_AVERAGED]
    return np.asarray(pool[best].mean(0))
