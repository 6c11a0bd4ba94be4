"""Measure until the influence is known well enough, and no longer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tikmix_fast.arguments import require_int
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

__all__ = ["until_known"]

_LOG = logging.getLogger("tikmix_fast")

Batch = TypeVar("Batch")


def until_known(
    batches: Iterable[Batch], matrix: Callable[[], InfluenceMatrix], rel_error: float, least: int
) -> Iterator[Batch]:
    """Yield batches until ``matrix().relative_error()`` of every task is at most ``rel_error``.

    Two other events end it, with a warning in the log: the batches run out, or the domain side's part of the error
    falls to half of ``rel_error``. The rest is then the error of the tasks or of the projection, which more batches of
    the domains hardly lower.

    Parameters
    ----------
    batches : iterable
        Whatever the caller measures one at a time.
    matrix : callable
        Returns the influence measured so far.
    rel_error : float
        Above 0.
    least : int
        Micro-batches, at least 2, that every domain needs before its error is trusted.

    Raises
    ------
    ValueError
        If ``rel_error`` or ``least`` is out of range.
    """
    if not rel_error > 0:
        raise ValueError(f"rel_error must be above 0; got {rel_error!r}")
    return _until_known(batches, matrix, rel_error, require_int("least", least, 2))


def _until_known(
    batches: Iterable[Batch], matrix: Callable[[], InfluenceMatrix], rel_error: float, least: int
) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        now = matrix()
        if now.microbatches.min() < least:
            continue
        if (now.relative_error() <= rel_error).all():
            return
        if (now.relative_error("domain") <= rel_error / 2).all():
            worst = int(now.relative_error().argmax())
            _LOG.warning(
                "stopped at a relative error of %.2g for task %r, above the limit of %.2g: the domains' part is small; "
                "measure more batches of the task (at least two per split), or project less",
                *(now.relative_error()[worst], now.tasks[worst], rel_error),
            )
            return
    now = matrix()
    fewest = int(now.microbatches.argmin())
    _LOG.warning(
        "the batches ended before the relative error was %.2g: it is %s; domain %r has %d micro-batches",
        rel_error,
        ", ".join(f"{error:.2g} for {task!r}" for error, task in zip(now.relative_error(), now.tasks, strict=True)),
        *(now.domains[fewest], now.microbatches[fewest]),
    )
