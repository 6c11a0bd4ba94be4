"""Gradient boosted trees as a surrogate, with the settings of RegMix's notebook. The only place that uses LightGBM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

__all__ = ["Trees"]

_SETTINGS = {
    "objective": "regression",
    "learning_rate": 0.01,
    "seed": 42,
    # The same trees whatever the number of threads.
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}
_ROUNDS = 1000


class Trees:
    """LightGBM: 1000 trees of L2 regression at a learning rate of 0.01, seed 42 (sail-sg/regmix).

    RegMix's notebook also stops early, watching the runs it is then tested on; here all trees are grown. Where data end
    the prediction stays constant, so that trees cannot tell which way to leave the mixtures they saw.
    """

    def __init__(self, booster: Any) -> None:
        self._booster = booster

    @classmethod
    def fit(cls, mixtures: Array, labels: Array) -> Trees:
        """Fit labels [N] at mixtures [N, m]."""
        import lightgbm

        return cls(lightgbm.train(dict(_SETTINGS), lightgbm.Dataset(mixtures, labels), _ROUNDS))

    def predict(self, mixtures: Array) -> Array:
        """Return predictions [N]."""
        return np.asarray(self._booster.predict(mixtures), dtype=np.float64)

    def to_dict(self) -> dict[str, Any]:
        """Return LightGBM's own text."""
        return {"text": self._booster.model_to_string()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], mixtures: Array) -> Trees:
        """Read what `to_dict` wrote.

        Raises
        ------
        ValueError
            If it is not a model of the m domains of ``mixtures`` [N, m].
        """
        import lightgbm

        try:
            booster = lightgbm.Booster(model_str=content["text"])
        except lightgbm.basic.LightGBMError as error:
            raise ValueError(f"the text of the trees cannot be read: {error}") from None
        if booster.num_feature() != mixtures.shape[1]:
            raise ValueError(f"the trees must be of {mixtures.shape[1]} domains; got {booster.num_feature()}")
        return cls(booster)
