"""Every setting of the demonstration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tikmix_fast.arguments import require_choice, require_int
from tikmix_fast.demo.gpt import GPTSettings

__all__ = ["DemoSettings"]


@dataclass(frozen=True)
class DemoSettings:
    """Settings of one demonstration: one seed, both arms.

    Attributes
    ----------
    seed : int
        Seed of the initial weights, the order of the data, and the choice of measured text. Both arms share it.
    steps : int
        Optimizer steps per arm. Both arms share the first stage, which is uniform and trained once.
    stages : int
        Number of equal parts of the training. At each boundary the first arm measures influence and gets a new mixture.
    batch : int
        Sequences per step, of ``model.length`` bytes each.
    learning_rate, weight_decay, clip : float
        Peak learning rate of AdamW, its weight decay, and the largest norm of the gradient.
    warm_up : int
        Steps in which the learning rate rises; then it falls along a cosine to a tenth.
    preconditioner : "adam" or "identity"
    task_batches, task_rows : int
        Micro-batches per task in each measurement, and sequences per micro-batch.
    domain_batches, domain_rows : int
        Micro-batches in each measurement, and sequences of every domain in each of them.
    task_splits : int
        Splits of the task's batches, which give its part of the standard error.
    uniformity, influence, diversity : float
        Factors of the three terms of TiKMiX-D.
    floor : float
        Smallest weight of a domain.
    smoothing : float
        Share of the old mixture in the new one, in [0, 1).
    evaluate_every : int
        Steps between two points of the loss curves.
    curve_rows : int
        Sequences per task for a point of the curves; the final losses use all.
    domain_bytes, task_bytes : int
        Most bytes of text per domain, and for each of a task's ``measure`` and ``report``.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """

    seed: int = 0
    steps: int = 1000
    stages: int = 10
    batch: int = 16
    model: GPTSettings = field(default_factory=GPTSettings)
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    warm_up: int = 50
    preconditioner: Literal["adam", "identity"] = "adam"
    task_batches: int = 6
    task_rows: int = 8
    domain_batches: int = 12
    domain_rows: int = 2
    task_splits: int = 6
    uniformity: float = 1.0
    influence: float = 1.0
    diversity: float = 1.0
    floor: float = 0.01
    smoothing: float = 0.3
    evaluate_every: int = 100
    curve_rows: int = 32
    domain_bytes: int = 1_000_000
    task_bytes: int = 48_000

    def __post_init__(self) -> None:
        least = {"seed": 0, "warm_up": 0, "stages": 2, "task_splits": 2, "task_batches": 2, "domain_batches": 2}
        for each in dataclasses.fields(self):
            if each.type == "int":
                require_int(each.name, getattr(self, each.name), least.get(each.name, 1))
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        for name in ("weight_decay", "uniformity", "influence", "diversity", "floor"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1); got {self.smoothing}")
        require_choice("preconditioner", self.preconditioner, ("adam", "identity"))
        if self.steps < self.stages:
            raise ValueError(f"steps must be at least the number of stages, {self.stages}; got {self.steps}")

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Steps at which the mixture changes."""
        return tuple(stage * self.steps // self.stages for stage in range(1, self.stages))

    @property
    def evaluations(self) -> tuple[int, ...]:
        """Steps after which the losses are evaluated, including the last step."""
        return (*range(self.evaluate_every, self.steps, self.evaluate_every), self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DemoSettings:
        """Read what `to_dict` returned."""
        return cls(**{**content, "model": GPTSettings(**content["model"])})
