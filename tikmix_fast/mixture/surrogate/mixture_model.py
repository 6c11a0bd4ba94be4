"""The surrogate of TiKMiX-M: from mixtures to labels, with the kind of model that predicts unseen mixtures best."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tikmix_fast import files
from tikmix_fast.arguments import require_choice, require_int
from tikmix_fast.matrix.rank_correlation import rank_correlation
from tikmix_fast.mixture.inputs import Array, Names, label, read_floats, read_mixtures, read_names
from tikmix_fast.mixture.result import plain_types
from tikmix_fast.mixture.surrogate.gaussian_process import GaussianProcess
from tikmix_fast.mixture.surrogate.ridge import Ridge
from tikmix_fast.mixture.surrogate.trees import Trees

Kind = Literal["auto", "ridge", "gp", "lightgbm"]

__all__ = ["MixtureModel", "Scores"]

_FORMAT = "tikmix_fast.mixture_model"
_VERSION = 1
# From the simplest to the most complex. A more complex kind must be better by more than the noise.
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
    """Cross-validated quality of one kind of model: each prediction comes from a model that has not seen the mixture.

    Attributes
    ----------
    r2 : float64 [n]
        Explained share of each label's variance; NaN for a constant label.
    spearman : float64 [n]
        Rank correlation, mean over the folds; NaN for a constant label.
    error : float64 [n]
        Root mean square error, in the label's unit.
    """

    r2: Array
    spearman: Array
    error: Array


class MixtureModel:
    """Predict labels of mixtures, for example losses of proxy runs or measured influence, from labelled mixtures.

    Each label has its own model, of one kind:

    - ``"ridge"``: linear in the weights, as TiKMiX-D assumes. The leave-one-out error chooses the penalty.
    - ``"gp"``: a Gaussian process with a width per domain. It is smooth, and far from the data it approaches a linear
      function of ``weights ** 0.25``. Fitting takes seconds per label for some 500 mixtures and grows with N^3.
    - ``"lightgbm"``: trees with RegMix's settings, constant outside the data.
    - ``"auto"``: for each label, the first of these whose cross-validated squared error is within one standard error of
      the best.

    Parameters
    ----------
    kind : {"auto", "ridge", "gp", "lightgbm"}
        `fit` always fits ridge too, and reports its scores.
    folds : int
        Folds of the cross-validation, 2 to N. `fit` costs as much as fitting ``folds + 1`` times.
    seed : int
        Seed of the folds.

    Attributes
    ----------
    kinds : tuple of str
        Kind per label, after `fit`.
    scores : dict from kind to Scores
        Cross-validated quality.
    mixtures : float64 [N, m]
        The fitted mixtures.
    low, high : float64 [m]
        The smallest box around ``mixtures``.
    spread : float64 [n]
        Standard deviation of each label over ``mixtures``.
    domains, tasks : tuple of str or None
    warnings : tuple of str
        The texts that `warnings.warn` got too.

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
        require_choice("kind", kind, ("auto", *_KINDS))
        self.kind, self.folds, self.seed = kind, require_int("folds", folds, 2), require_int("seed", seed, 0)
        self._models: tuple[Surrogate, ...] = ()

    def fit(
        self,
        mixtures: Any,
        labels: Any,
        *,
        domains: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
    ) -> MixtureModel:
        """Cross-validate, choose the kinds, fit to all mixtures, and return the model itself.

        Parameters
        ----------
        mixtures : array_like [N, m]
            At least 8 rows, at least 0, that sum to 1 within 0.01 (for rounded tables); scaled to sum to 1.
        labels : array_like [N, n] or [N]
            Finite. `tikmix_m` takes their sign as an argument.
        domains, tasks : sequence of str, optional
            Names of the columns of ``mixtures`` and of ``labels``.

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described; the model then stays as it was.

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
        names = None if domains is None else read_names("domains", domains, points.shape[1])
        rows = None if tasks is None else read_names("tasks", tasks, values.shape[1])
        tried = _KINDS if self.kind == "auto" else tuple(dict.fromkeys(("ridge", self.kind)))
        folds = np.array_split(np.random.default_rng(self.seed).permutation(len(points)), self.folds)
        unseen = {kind: _predict_unseen(kind, points, values, folds) for kind in tried}
        kinds = (self.kind,) * values.shape[1] if self.kind != "auto" else _choose(unseen, values)
        models = tuple(_FIT[kind](points, values[:, i]) for i, kind in enumerate(kinds))
        scores = {kind: _score(predicted, values, folds) for kind, predicted in unseen.items()}

        self._models, self.kinds, self.scores = models, kinds, scores
        self.mixtures, self.spread = points, values.std(axis=0)
        self.domains, self.tasks = names, rows
        self.warnings = ()
        if "lightgbm" in scores and not (scores["lightgbm"].error < scores["ridge"].error).any():
            self.warnings = (
                "trees predict no label better than a linear model does (cross-validated): they find no interaction of"
                " domains here, so with them TiKMiX-M adds nothing over TiKMiX-D",
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
        """Cross-validated root mean square error [n] of the chosen kinds."""
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
        """Return the cross-validated scores as text, a line per label; ``*`` marks the chosen kind."""
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
        """Write the model as JSON, atomically, and return the path. After `load`, predictions are equal bit by bit."""
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
                kind: {name: plain_types(getattr(each, name)) for name in ("r2", "spearman", "error")}
                for kind, each in self.scores.items()
            },
            "models": [model.to_dict() for model in self._models],
            "warnings": self.warnings,
        }
        return files.write_sealed_json(path, {"format": _FORMAT, "version": _VERSION, "content": content})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MixtureModel:
        """Read a model that `save` wrote. No code in the file runs.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is not a mixture model, has another version, or was changed; the message names it.
        """
        whole = files.read_json(path, _FORMAT, sealed=True)
        with files.naming(path):
            if whole.get("version") != _VERSION:
                raise ValueError(f"mixture model version must be {_VERSION}; got {whole.get('version')!r}")
            return cls._from_content(whole["content"])

    @classmethod
    def _from_content(cls, content: Mapping[str, Any]) -> MixtureModel:
        model = cls(content["kind"], folds=content["folds"], seed=content["seed"])
        # Do not scale them again: that could change the last bit.
        points = np.array(content["mixtures"], dtype=np.float64)
        if not np.allclose(read_mixtures("mixtures", points), points, rtol=0, atol=1e-12):
            raise ValueError("mixtures must sum to 1 in every row")
        kinds = tuple(content["kinds"])
        n = len(kinds)
        if not kinds or len(content["models"]) != n or not set(kinds) <= set(_KINDS) & set(content["scores"]):
            raise ValueError("kinds, models and scores must be of the same labels and kinds")
        domains, tasks = content["domains"], content["tasks"]
        model.domains = None if domains is None else read_names("domains", domains, points.shape[1])
        model.tasks = None if tasks is None else read_names("tasks", tasks, n)
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


def _predict_unseen(kind: str, points: Array, values: Array, folds: list[NDArray[np.intp]]) -> Array:
    predicted = np.empty_like(values)
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(points)), fold)
        for i in range(values.shape[1]):
            predicted[fold, i] = _FIT[kind](points[rest], values[rest, i]).predict(points[fold])
    return predicted


def _choose(unseen: Mapping[str, Array], values: Array) -> tuple[str, ...]:
    """Return each label's simplest kind that is worse than the best by at most one standard error."""
    squares = {kind: (predicted - values) ** 2 for kind, predicted in unseen.items()}
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
    ranks = np.array([rank_correlation(predicted[fold], values[fold], axis=0) for fold in folds if len(fold) > 1])
    known = ~np.isnan(ranks)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Scores(
            r2=np.where(np.ptp(values, axis=0) > 0, 1.0 - squares / values.var(axis=0), np.nan),
            spearman=np.where(known, ranks, 0.0).sum(axis=0) / known.sum(axis=0) if len(ranks) else squares * np.nan,
            error=np.sqrt(squares),
        )


def _read_labels(labels: Any, count: int) -> Array:
    values = read_floats("labels", labels)
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or values.shape[0] != count or not values.shape[1]:
        raise ValueError(f"labels must have shape [N, n], a row for each of {count} mixtures; got {values.shape}")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"labels must be finite; got {values[row, column]} at row {row}, label {column}; drop the row")
    return values
