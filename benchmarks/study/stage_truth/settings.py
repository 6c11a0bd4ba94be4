"""Every number of the truth over a stage."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.study.settings import SETTINGS as STUDY
from benchmarks.study.settings import StudySettings

__all__ = ["REPORTED_SEEDS", "SETTINGS", "StageTruthSettings"]

REPORTED_SEEDS = (10, 11, 12, 13, 14)


@dataclass(frozen=True)
class StageTruthSettings:
    """Settings of one truth, all seeds.

    Attributes
    ----------
    study : StudySettings
        The run that gives the checkpoints; its mixture is uniform.
    steps : tuple of int
        Optimizer steps before each checkpoint.
    shares : tuple of float
        Shares of the mixture's weight that move to one domain.
    horizons : tuple of int
        K, rising: further optimizer steps at which losses are taken.
    draws : int
        Orders of the data; at least 2.
    rows : int
        Sequences of each task for a loss, spread over its text.
    task_batches, domain_batches : int
        Micro-batches per task and per domain in the measurement of S.
    seeds : tuple of int
        Default seeds: those for tuning.
    """

    study: StudySettings
    steps: tuple[int, ...] = (150, 400, 640)
    shares: tuple[float, ...] = (0.1, 0.4)
    horizons: tuple[int, ...] = (10, 60, 160)
    draws: int = 3
    rows: int = 64
    task_batches: int = 36
    domain_batches: int = 100
    seeds: tuple[int, ...] = (100, 101)

    def __post_init__(self) -> None:
        if self.draws < 2:
            raise ValueError(f"draws must be at least 2, for an error; got {self.draws}")
        if list(self.horizons) != sorted(set(self.horizons)) or self.horizons[0] < 1:
            raise ValueError(f"horizons must rise and be positive; got {self.horizons}")
        if max(self.steps) + self.horizons[-1] > self.study.main.steps:
            raise ValueError(f"steps + horizons must lie within the run of {self.study.main.steps} steps")
        if not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares must lie in (0, 1]; got {self.shares}")


SETTINGS = {
    "tiny": StageTruthSettings(
        STUDY["tiny"], steps=(4,), shares=(0.4,), horizons=(2, 4), draws=2, rows=4, task_batches=2, domain_batches=2
    ),
    "small": StageTruthSettings(STUDY["small"]),
}
