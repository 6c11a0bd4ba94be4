"""The surrogate of TiKMiX-M: from mixtures to labels, by the kind of model that predicts unseen mixtures best."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from tikmix_fast import files
from tikmix_fast.mixture.inputs import Names, label, read_mixtures, read_whole
from tikmix_fast.mixture.surrogate.gaussian_process import GaussianProcess
from tikmix_fast.mixture.surrogate.ridge import Ridge
from tikmix_fast.mixture.surrogate.trees import Trees

Array = NDArray[np.float64]
Kind = Literal["auto", "ridge", "gp", "lightgbm"]

__all__ = ["MixtureModel", "Scores", "rank_correlation"]

_FORMAT = "tikmix_fast.mixture_model"
_VERSION = 1
# From the simplest on: one gives way only to what is better by more than the noise.
_KINDS = ("ridge", "gp", "lightgbm")
_SMALLEST = 8


class Surrogate(Protocol):
    """A fitted model of one label."""

    def predict(self, mixtures: Array) -> Array:
        """Return predictions [N]."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""


_FIT: dict[str, Callable[[Array, Array], Surrogate]] = {
    "ridge": Ridge.fit,
    "gp": GaussianProcess.fit,
    "lightgbm": Trees.fit,
}
_READ: dict[str, Callable[[Mapping[str, Any], Array], Surrogate]] = {
    "ridge": Ridge.from_dict,
    "gp": GaussianProcess.from_dict,
    "lightgbm": Trees.from_dict,
}


@dataclass(frozen=True, eq=False)
class Scores:
    """Cross-validated quality of one kind of model, every mixture predicted by a model that had not seen it.

    Attributes
    ----------
    r2 : float64 [n]
        Share of each label's variance that is explained; NaN for a label that is constant.
    spearman : float64 [n]
        Rank correlation, mean over the folds; NaN for a label that is constant.
    error : float64 [n]
        Root mean square error, in the label's unit.
    """

    r2: Array
    spearman: Array
    error: Array


class MixtureModel:
    """Predict labels of mixtures, such as losses of proxy runs or measured influence, from labelled mixtures.

    Every label has a model of its own, of one kind:

    - ``"ridge"``: linear in the weights, with a penalty chosen by leave-one-out error. TiKMiX-D assumes no more.
    - ``"gp"``: a Gaussian process with a width per domain. Smooth, falls back to a linear function of
      ``weights ** 0.25`` far from the data; fitting takes seconds a label for some 500 mixtures and grows with N^3.
    - ``"lightgbm"``: trees with RegMix's settings. Constant where data end.
    - ``"auto"``: for each label the first of these whose squared error in cross-validation is within one standard
      error of the best.

    Parameters
    ----------
    kind : {"auto", "ridge", "gp", "lightgbm"}
        Ridge is always fitted too and its scores are reported beside.
    folds : int
        Of the cross-validation, 2 to N. The cost of `fit` is that of fitting ``folds + 1`` times.
    seed : int
        Of the folds.

    Attributes
    ----------
    kinds : tuple of str
        Kind per label, after `fit`.
    scores : dict from kind to Scores
        Cross-validated.
    mixtures : float64 [N, m]
        What it was fitted to.
    low, high : float64 [m]
        The smallest box around ``mixtures``.
    spread : float64 [n]
        Standard deviation of each label over ``mixtures``.
    domains, tasks : tuple of str or None
    warnings : tuple of str
        Also given through `warnings.warn`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> mixtures = rng.dirichlet(np.ones(3), size=64)
    >>> losses = np.column_stack([mixtures @ [3.0, 1.0, 2.0], np.exp(-3 * mixtures[:, 0])])
    >>> model = MixtureModel(kind="ridge").fit(mixtures, losses, tasks=["linear", "bent"])
    >>> model.predict([[0.2, 0.3, 0.5]])[:, 0].round(6).tolist()
    [1.9]
    >>> bool(model.scores["ridge"].r2[0] > 0.999 > model.scores["ridge"].r2[1])
    True
    """

    kinds: tuple[str, ...]
    scores: dict[str, Scores]
    mixtures: Array
    spread: Array
    domains: Names
    tasks: Names
    warnings: tuple[str, ...]

    def __init__(self, kind: Kind = "auto", *, folds: int = 5, seed: int = 0) -> None:
        if kind not in ("auto", *_KINDS):
            raise ValueError(f'kind must be "auto", "ridge", "gp" or "lightgbm"; got {kind!r}')
        if not isinstance(folds, (int, np.integer)) or folds < 2:
            raise ValueError(f"folds must be an integer of at least 2; got {folds!r}")
        self.kind, self.folds, self.seed = kind, int(folds), read_whole("seed", seed, 0)
        self._models: tuple[Surrogate, ...] = ()

    def fit(
        self,
        mixtures: Any,
        labels: Any,
        *,
        domains: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
    ) -> MixtureModel:
        """Cross-validate, choose the kinds, and fit to all mixtures; returns the model itself.

        Parameters
        ----------
        mixtures : array_like [N, m]
            At least 8. Rows at least 0 that sum to 1 within 0.01 (tables are rounded); scaled to sum to 1.
        labels : array_like [N, n] or [N]
            Finite; the sign is told to `tikmix_m`.
        domains, tasks : sequence of str, optional
            Names of the columns of ``mixtures`` and of ``labels``.

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described; the model is then as it was.

        Warns
        -----
        UserWarning
            If trees predict no label better than a linear model does.
        """
        points = read_mixtures("mixtures", mixtures)
        values = _read_labels(labels, len(points))
        if len(points) < max(_SMALLEST, self.folds):
            raise ValueError(
                f"mixtures must be at least {max(_SMALLEST, self.folds)} for {self.folds} folds; got {len(points)};"
                " label more of them"
            )
        names = _read_names("domains", domains, points.shape[1])
        rows = _read_names("tasks", tasks, values.shape[1])
        tried = _KINDS if self.kind == "auto" else tuple(dict.fromkeys(("ridge", self.kind)))
        folds = np.array_split(np.random.default_rng(self.seed).permutation(len(points)), self.folds)
        unseen = {kind: _predict_unseen(kind, points, values, folds) for kind in tried}
        kinds = (self.kind,) * values.shape[1] if self.kind != "auto" else _choose(unseen, values)
        models = tuple(_FIT[kind](points, values[:, i]) for i, kind in enumerate(kinds))
        scores = {kind: _score(found, values, folds) for kind, found in unseen.items()}

        self._models, self.kinds, self.scores = models, kinds, scores
        self.mixtures, self.spread = points, values.std(axis=0)
        self.domains, self.tasks = names, rows
        self.warnings = ()
        if "lightgbm" in scores and not (scores["lightgbm"].error < scores["ridge"].error).any():
            self.warnings = (
                "trees predict no label better than a linear model does (cross-validated): there is no interaction of"
                " domains here that they could learn, and TiKMiX-M adds nothing over TiKMiX-D by them",
            )
        for each in self.warnings:
            warnings.warn(each, stacklevel=2)
        return self

    @property
    def low(self) -> Array:
        """Least weight [m] of each domain in the fitted mixtures."""
        return np.asarray(self._fitted().mixtures.min(axis=0))

    @property
    def high(self) -> Array:
        """Largest weight [m] of each domain in the fitted mixtures."""
        return np.asarray(self._fitted().mixtures.max(axis=0))

    @property
    def error(self) -> Array:
        """Cross-validated root mean square error [n] of the kinds chosen."""
        scores = self._fitted().scores
        return np.array([scores[kind].error[i] for i, kind in enumerate(self.kinds)])

    def predict(self, mixtures: Any) -> Array:
        """Return the predicted labels [N, n] of mixtures [N, m].

        Raises
        ------
        TypeError, ValueError
            If the mixtures are not as in `fit`, or nothing has been fitted.
        """
        points = read_mixtures("mixtures", mixtures, self._fitted().mixtures.shape[1])
        return np.column_stack([model.predict(points) for model in self._models])

    def table(self) -> str:
        """Return the cross-validated scores as text, a line per label; ``*`` marks the kind chosen."""
        scores = self._fitted().scores
        names = [label(self.tasks, i) for i in range(len(self.kinds))]
        width = max(len("label"), *map(len, names))
        lines = [f"{'label':{width}}" + "".join(f"  {kind + ' R2':>12} {'Spearman':>9} " for kind in scores)]
        for i, name in enumerate(names):
            cells = "".join(
                f"  {each.r2[i]:12.4f} {each.spearman[i]:9.4f}{'*' if kind == self.kinds[i] else ' '}"
                for kind, each in scores.items()
            )
            lines.append(f"{name:{width}}{cells}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the model as JSON, atomically; returns the path. `load` gives the same predictions to the last bit."""
        self._fitted()
        content = {
            "kind": self.kind,
            "folds": self.folds,
            "seed": self.seed,
            "domains": self.domains,
            "tasks": self.tasks,
            "mixtures": self.mixtures.tolist(),
            "spread": self.spread.tolist(),
            "kinds": self.kinds,
            "scores": {
                kind: {name: _plain(getattr(each, name)) for name in ("r2", "spearman", "error")}
                for kind, each in self.scores.items()
            },
            "models": [model.to_dict() for model in self._models],
            "warnings": self.warnings,
        }
        return files.write_sealed_json(path, {"format": _FORMAT, "version": _VERSION, "content": content})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MixtureModel:
        """Read a model that `save` wrote. Nothing in the file is run.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is not a mixture model, is of another version, or was changed; the message names it.
        """
        whole = files.read_json(path, _FORMAT, sealed=True)
        with files.naming(path):
            if whole.get("version") != _VERSION:
                raise ValueError(f"mixture model version must be {_VERSION}; got {whole.get('version')!r}")
            return cls._from_content(whole["content"])

    @classmethod
    def _from_content(cls, content: Mapping[str, Any]) -> MixtureModel:
        model = cls(content["kind"], folds=content["folds"], seed=content["seed"])
        # As they were: scaling them once more could move the last bit.
        points = np.array(content["mixtures"], dtype=np.float64)
        if not np.allclose(read_mixtures("mixtures", points), points, rtol=0, atol=1e-12):
            raise ValueError("mixtures must sum to 1 in every row")
        kinds = tuple(content["kinds"])
        n = len(kinds)
        if not kinds or len(content["models"]) != n or not set(kinds) <= set(_KINDS) & set(content["scores"]):
            raise ValueError("kinds, models and scores must fit each other")
        model.domains = _read_names("domains", content["domains"], points.shape[1])
        model.tasks = _read_names("tasks", content["tasks"], n)
        model.spread = np.array(content["spread"], dtype=np.float64)
        model.scores = {
            kind: Scores(**{name: np.array(numbers, dtype=np.float64) for name, numbers in each.items()})
            for kind, each in content["scores"].items()
        }
        for each in (model.spread, *(score.error for score in model.scores.values())):
            if each.shape != (n,) or not np.isfinite(each).all():
                raise ValueError(f"spread and scores must hold {n} numbers")
        model.mixtures, model.kinds, model.warnings = points, kinds, tuple(content["warnings"])
        model._models = tuple(_READ[kind](each, points) for kind, each in zip(kinds, content["models"], strict=True))
        return model

    def _fitted(self) -> MixtureModel:
        if not self._models:
            raise ValueError("the model must be fitted first; call fit(mixtures, labels)")
        return self


def rank_correlation(predicted: Array, truth: Array) -> Array:
    """Return Spearman's correlation of each column [n]; NaN where one side is constant."""
    first, second = (rankdata(each, axis=0) for each in (predicted, truth))
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((first * second).sum(0) / np.sqrt((first**2).sum(0) * (second**2).sum(0)))


def _predict_unseen(kind: str, points: Array, values: Array, folds: list[NDArray[np.intp]]) -> Array:
    predicted = np.empty_like(values)
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(points)), fold)
        for i in range(values.shape[1]):
            predicted[fold, i] = _FIT[kind](points[rest], values[rest, i]).predict(points[fold])
    return predicted


def _choose(unseen: Mapping[str, Array], values: Array) -> tuple[str, ...]:
    """Return for each label the simplest kind that is not worse than the best by more than one standard error."""
    squares = {kind: (found - values) ** 2 for kind, found in unseen.items()}
    chosen = []
    for i in range(values.shape[1]):
        best = min(squares, key=lambda kind: float(squares[kind][:, i].mean()))
        for kind, each in squares.items():
            excess = each[:, i] - squares[best][:, i]
            if excess.mean() <= excess.std(ddof=1) / np.sqrt(len(excess)):
                chosen.append(kind)
                break
    return tuple(chosen)


def _score(predicted: Array, values: Array, folds: list[NDArray[np.intp]]) -> Scores:
    squares = ((predicted - values) ** 2).mean(axis=0)
    ranks = np.array([rank_correlation(predicted[fold], values[fold]) for fold in folds if len(fold) > 1])
    known = ~np.isnan(ranks)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Scores(
            r2=np.where(np.ptp(values, axis=0) > 0, 1.0 - squares / values.var(axis=0), np.nan),
            spearman=np.where(known, ranks, 0.0).sum(axis=0) / known.sum(axis=0) if len(ranks) else squares * np.nan,
            error=np.sqrt(squares),
        )


def _read_labels(labels: Any, count: int) -> Array:
    try:
        values = np.array(labels, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"labels must hold numbers; got {type(labels).__name__}") from None
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or values.shape[0] != count or not values.shape[1]:
        raise ValueError(f"labels must have shape [N, n], a row for each of {count} mixtures; got {values.shape}")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"labels must be finite; got {values[row, column]} at row {row}, label {column}; drop the row")
    return values


def _read_names(name: str, given: Sequence[str] | None, count: int) -> Names:
    if given is None:
        return None
    names = tuple(given)
    if len(names) != count or len(set(names)) != count or not all(isinstance(each, str) and each for each in names):
        raise ValueError(f"{name} must be {count} different non-empty strings; got {names!r}")
    return names


def _plain(numbers: Array) -> list[float | None]:
    return [float(each) if np.isfinite(each) else None for each in numbers]
