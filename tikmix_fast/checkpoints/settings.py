"""Every choice of a measurement at a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tikmix_fast.arguments import require_int
from tikmix_fast.ops.common.projection import ProjectionKind

__all__ = ["CheckpointSettings"]

_LEAST = {
    "tokens": 2,
    "task_tokens": 2,
    "fit_tokens": 2,
    "length": 2,
    "batch": 1,
    "task_splits": 1,
    "seed": 0,
    "save_every": 1,
    "projection": 2,
}


@dataclass(frozen=True)
class CheckpointSettings:
    """What is measured, and how.

    Attributes
    ----------
    model : str
        See `load_checkpoint`.
    domains, tasks : mapping of str to str
        Name and path: a file, a folder or a pattern, of text or of tokens; see `tikmix_fast.data.domain.open_domain`.
    tokenizer : str
        See `load_tokenizer`.
    token_dtype : str or None
        Integer dtype of .bin files that have no .idx; None: there are none.
    preconditioner : "identity", "adam", "ekfac" or "diagonal_fisher"
    optimizer : str or None
        A file that `save_adam` wrote; "adam" needs it.
    damping : float
        For "ekfac" and "diagonal_fisher".
    projection : int or None
        Side of random projections; None: exact.
    projection_kind : str
    tokens, task_tokens, fit_tokens : int
        Most tokens per domain, per task, and of all domains together to fit "ekfac" or "diagonal_fisher".
    rel_error : float or None
        Stop measuring domains when `InfluenceMatrix.relative_error` of every task is at most this.
    length : int or None
        Targets per sequence; None: 512, or the model's limit if that is lower.
    batch : int
        Most sequences per micro-batch.
    task_splits : int
        See `InfluenceEngine`.
    exclude : tuple of str
        Patterns of parameter names to leave out.
    dtype, device : str
        Of the weights.
    seed : int
        Seed for the choice of text, projections, sampled labels, and random weights.
    save_every : int
        Micro-batches between two saves of the state.

    Raises
    ------
    ValueError
        If a number is out of its range, or options contradict each other.
    """

    model: str
    domains: Mapping[str, str]
    tasks: Mapping[str, str]
    tokenizer: str = "auto"
    token_dtype: str | None = None
    preconditioner: Literal["identity", "adam", "ekfac", "diagonal_fisher"] = "identity"
    optimizer: str | None = None
    damping: float = 0.1
    projection: int | None = None
    projection_kind: ProjectionKind = "countsketch"
    tokens: int = 65536
    task_tokens: int = 32768
    fit_tokens: int = 65536
    rel_error: float | None = None
    length: int | None = None
    batch: int = 8
    task_splits: int = 4
    exclude: tuple[str, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "cpu"
    seed: int = 0
    save_every: int = 20

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None:
                require_int(name, value, least)
        if self.rel_error is not None and not self.rel_error > 0:
            raise ValueError(f"rel_error must be above 0; got {self.rel_error}")
        for kind, paths in (("domain", self.domains), ("task", self.tasks)):
            if not paths:
                raise ValueError(f"{kind} must be given at least once")
        if (self.preconditioner == "adam") != (self.optimizer is not None):
            raise ValueError(
                "preconditioner 'adam' and optimizer go together: give a file that "
                "tikmix_fast.checkpoints.adam_files.save_adam wrote"
            )
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"device must be cpu or cuda; got {self.device!r}") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device must be one that torch sees; got {self.device!r}, but torch sees no GPU")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return dataclasses.asdict(self) | {"exclude": list(self.exclude)}
