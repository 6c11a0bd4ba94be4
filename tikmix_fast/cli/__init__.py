"""The command ``tikmix-fast``. Each command imports slow packages itself, so ``--help`` stays fast."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit: 0 if all went well, 1 if there is no result, 2 if the user made a mistake."""
    from tikmix_fast.cli.app import app

    app(prog_name="tikmix-fast")
