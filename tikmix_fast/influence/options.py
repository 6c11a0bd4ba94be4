"""The settings of an engine, checked when they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tikmix_fast.arguments import require_choice, require_int
from tikmix_fast.influence.queries.projection import Projection

__all__ = ["EngineOptions"]


@dataclass(frozen=True)
class EngineOptions:
    """The arguments of `InfluenceEngine` that do not change while it measures.

    Raises
    ------
    ValueError, TypeError
        If a name is empty or repeated, or a value is out of range.
    """

    domains: tuple[str, ...]
    tasks: tuple[str, ...]
    projection: Projection | None
    exclude: tuple[str, ...]
    reduction: Literal["mean", "sum"]
    grad: Literal["fused", "ordinary"]
    task_splits: int
    batch_dim: Literal[0, 1] | None
    check_every: int
    allow_stale: bool
    max_dropped_in_row: int
    queries_device: Literal["cpu", "auto"] | None
    share_queries: bool

    def __post_init__(self) -> None:
        for argument in ("domains", "tasks"):
            object.__setattr__(self, argument, _names(argument, getattr(self, argument)))
        exclude: Any = self.exclude
        object.__setattr__(self, "exclude", (exclude,) if isinstance(exclude, str) else tuple(exclude))
        device: Any = self.queries_device
        object.__setattr__(self, "queries_device", None if device is None else str(device))
        if self.projection is not None and not isinstance(self.projection, Projection):
            raise TypeError(f"projection must be a tikmix_fast.Projection or None; got {self.projection!r}")
        for argument, choices in (
            ("reduction", ("mean", "sum")),
            ("grad", ("fused", "ordinary")),
            ("batch_dim", (None, 0, 1)),
            ("queries_device", (None, "cpu", "auto")),
        ):
            require_choice(argument, getattr(self, argument), choices)
        if self.share_queries and self.queries_device is not None:
            raise ValueError(f"queries_device must be None with share_queries; got {self.queries_device!r}")
        require_int("task_splits", self.task_splits, 1)
        require_int("check_every", self.check_every, 0)
        require_int("max_dropped_in_row", self.max_dropped_in_row, 1)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [n tasks, m domains] of the matrix."""
        return len(self.tasks), len(self.domains)

    @property
    def projection_settings(self) -> dict[str, Any] | None:
        """The projection as plain JSON types."""
        return None if self.projection is None else asdict(self.projection)


def _names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names) or not len(names):
        raise ValueError(f"{argument} must be a sequence of non-empty names; got {names!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"{argument} must be unique; got {list(names)!r}")
    return tuple(names)
