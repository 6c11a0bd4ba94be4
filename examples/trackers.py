"""Mixtures and influence in experiment trackers. Each tracker imports its library when it is made."""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from tikmix_fast.data.optional_packages import optional
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

__all__ = ["MLflow", "TensorBoard", "Tracker", "WandB"]


class Tracker(ABC):
    """The place for numbers of a run. Your own tracker defines `log`.

    Examples
    --------
    >>> class Printed(Tracker):
    ...     def log(self, step, numbers):
    ...         print(step, numbers)
    >>> Printed().log_mixture(100, {"web": 1.0, "c++": 0.0})
    100 {'mixture/web': 1.0, 'mixture/c__': 0.0, 'mixture_effective_domains': 1.0}
    """

    @abstractmethod
    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take finite numbers by name; names consist of letters, digits and ``_ - . /``."""

    def log_mixture(self, step: int, weights: Mapping[str, float]) -> None:
        """Log the weight of every domain as ``mixture/DOMAIN``, and exp(entropy) as ``mixture_effective_domains``.

        Raises
        ------
        ValueError
            If two domains have the same name after every other character becomes a ``_``.
        """
        entropy = -math.fsum(weight * math.log(weight) for weight in weights.values() if weight > 0)
        self.log(
            step,
            {
                **_named({("mixture", domain): weight for domain, weight in weights.items()}),
                "mixture_effective_domains": math.exp(entropy),
            },
        )

    def log_matrix(self, step: int, matrix: InfluenceMatrix) -> None:
        """Log every cell as ``influence/TASK/DOMAIN`` and its standard error as ``influence_stderr/TASK/DOMAIN``.

        Cells without a measurement are left out.

        Raises
        ------
        ValueError
            If two tasks or domains have the same name after every other character becomes a ``_``.
        """
        cells: dict[tuple[str, ...], float] = {
            (kind, task, domain): float(values[i, j])
            for kind, values in (("influence", matrix.values), ("influence_stderr", matrix.stderr))
            for i, task in enumerate(matrix.tasks)
            for j, domain in enumerate(matrix.domains)
            if np.isfinite(values[i, j])
        }
        self.log(step, _named(cells))

    def close(self) -> None:  # noqa: B027  # most trackers have nothing to do
        """Write the numbers that are still in a buffer."""


class TensorBoard(Tracker):
    """Event files for TensorBoard.

    Parameters
    ----------
    folder : path
        Folder of the files: ``tensorboard --logdir FOLDER``.

    Raises
    ------
    ImportError
        If tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        optional("tensorboard", "TensorBoard", _INSTALL)
        self._writer = optional("torch.utils.tensorboard", "TensorBoard", _INSTALL).SummaryWriter(os.fspath(folder))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


class WandB(Tracker):
    """A run of Weights & Biases.

    Parameters
    ----------
    run : wandb Run, optional
        None: the run of `wandb.init`, which is offline after ``mode="offline"``. Steps must not decrease: W&B drops
        numbers of earlier steps.

    Raises
    ------
    ImportError
        If wandb is not installed.
    ValueError
        If there is no run.
    """

    def __init__(self, run: Any = None) -> None:
        self._run = optional("wandb", "Weights & Biases", _INSTALL).run if run is None else run
        if self._run is None:
            raise ValueError("run must be a run of W&B; got None, and wandb.init(...) started none")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)


class MLflow(Tracker):
    """A run of MLflow.

    Parameters
    ----------
    run_id : str, optional
        None: the active run of `mlflow.start_run`.

    Raises
    ------
    ImportError
        If mlflow is not installed.
    ValueError
        If there is no run.
    """

    def __init__(self, run_id: str | None = None) -> None:
        self._mlflow = optional("mlflow", "MLflow", _INSTALL)
        if run_id is None:
            active = self._mlflow.active_run()
            if active is None:
                raise ValueError("run_id must name a run; got None, and mlflow.start_run() started none")
            run_id = active.info.run_id
        self._run_id = run_id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step, run_id=self._run_id)


_INSTALL = "pip install 'tikmix_fast[trackers]'"


def _named(numbers: Mapping[tuple[str, ...], float]) -> dict[str, float]:
    """Join the parts of each name, with characters that every tracker takes."""
    named: dict[str, float] = {}
    for parts, number in numbers.items():
        name = "/".join(re.sub(r"[^-\w.]", "_", part, flags=re.ASCII) for part in parts)
        if name in named:
            raise ValueError(f"names must differ in letters, digits, '-', '.' or '_'; got {name!r} twice; rename one")
        named[name] = number
    return named
