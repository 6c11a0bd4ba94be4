"""Tell the user about a mistake in one line, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

__all__ = ["user_mistakes"]


@contextmanager
def user_mistakes() -> Iterator[None]:
    """Turn the errors that bad input raises into one line on stderr and exit code 2.

    So does an optional package that is missing. To be put around the reading of input and the checks of options only:
    anywhere else these errors are defects, and their traceback is wanted.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
