"""Import a package that only some uses need, and say how to get it where it is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["optional"]


def optional(module: str, purpose: str, install: str = "pip install 'tikmix_fast[data]'") -> Any:
    """Return a module.

    Parameters
    ----------
    module : str
        Its full name.
    purpose : str
        What needs it, in words.
    install : str
        The command that installs it.

    Raises
    ------
    ImportError
        If the package is not installed; the message has all three.

    Examples
    --------
    >>> optional("no_such_package.part", "reading .xyz files")
    Traceback (most recent call last):
    ImportError: reading .xyz files needs the package no_such_package; install it: pip install 'tikmix_fast[data]'
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is installed, but lacks something itself
        raise ImportError(f"{purpose} needs the package {package}; install it: {install}") from None
