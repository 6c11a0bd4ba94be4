"""Gradient boosted trees as a surrogate, with the settings of RegMix's notebook. Only this file uses LightGBM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tikmix_fast.mixture.inputs import Array

__all__ = ["Trees"]

_SETTINGS = {
    "objective": "regression",
    "learning_rate": 0.01,
    "seed": 42,
    # Any number of threads gives the same trees.
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}
_ROUNDS = 1000


class Trees:
    """LightGBM: 1000 trees of L2 regression at a learning rate of 0.01, seed 42 (sail-sg/regmix).

    RegMix's notebook also stops early, by the error on the runs it then tests on; here all trees grow. Outside the data
    the prediction is constant, so trees cannot say in which direction to leave the fitted mixtures.
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
        """Read the output of `to_dict`.

        Raises
        ------
        ValueError
            If the text is not a model of the m domains of ``mixtures`` [N, m].
        """
        import lightgbm

        try:
            booster = lightgbm.Booster(model_str=content["text"])
        except lightgbm.basic.LightGBMError as error:
            raise ValueError(f"the text of the trees cannot be read: {error}") from None
        if booster.num_feature() != mixtures.shape[1]:
            raise ValueError(f"the trees must be of {mixtures.shape[1]} domains; got {booster.num_feature()}")
        return cls(booster)
