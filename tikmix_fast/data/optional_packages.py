"""Import an optional package, or say how to install it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["optional"]


def optional(module: str, purpose: str, install: str = "pip install 'tikmix_fast[data]'") -> Any:
    """Import and return a module.

    Parameters
    ----------
    module : str
        Full name.
    purpose : str
        What needs the module, for the message.
    install : str
        The command that installs it.

    Raises
    ------
    ImportError
        If the package is not installed; the message contains all three arguments.

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
            raise  # the package is installed, but one of its own imports fails
        raise ImportError(f"{purpose} needs the package {package}; install it: {install}") from None
