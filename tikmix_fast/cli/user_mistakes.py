"""Report a mistake of the user in one line, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

__all__ = ["user_mistakes"]


@contextmanager
def user_mistakes() -> Iterator[None]:
    """Turn the errors of bad input, and of missing optional packages, into one line on stderr and exit code 2.

    Use it only around code that reads input or checks options. Elsewhere the same errors are defects of this package,
    and their traceback must stay visible.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
