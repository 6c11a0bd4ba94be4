"""Folders that a command writes into."""

from __future__ import annotations

from pathlib import Path

__all__ = ["make_folder"]


def make_folder(out: Path) -> None:
    """Make the folder and write into it, so that a folder that cannot be written to fails now and not after minutes."""
    import tempfile

    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"out must be a folder that can be written to; got {str(out)!r} ({error.strerror})") from None
