"""Make a preconditioner from its name."""

from __future__ import annotations

from collections.abc import Callable

from tikmix_fast.influence.preconditioners.adam import Adam
from tikmix_fast.influence.preconditioners.ekfac import EKFAC, DiagonalFisher
from tikmix_fast.influence.preconditioners.protocol import Identity, Preconditioner

__all__ = ["make_preconditioner"]


def make_preconditioner(choice: str | Preconditioner) -> Preconditioner:
    """Return the preconditioner of that name, or the object itself.

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        If it is neither a name nor a `Preconditioner`.
    """
    if isinstance(choice, str):
        known: dict[str, Callable[[], Preconditioner]] = {
            "identity": Identity,
            "adam": Adam,
            "ekfac": EKFAC,
            "diagonal_fisher": DiagonalFisher,
        }
        if choice not in known:
            raise ValueError(f"preconditioner must be one of {', '.join(known)} or a Preconditioner; got {choice!r}")
        return known[choice]()
    if not isinstance(choice, Preconditioner) or isinstance(choice, type):
        raise TypeError(f"preconditioner must be a name or have prepare, apply and name; got {choice!r}")
    return choice
