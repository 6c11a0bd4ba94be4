"""The application with all its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from tikmix_fast._version import __version__
from tikmix_fast.cli.bench import bench
from tikmix_fast.cli.demo import demo
from tikmix_fast.cli.env import env
from tikmix_fast.cli.influence import influence
from tikmix_fast.cli.mix import mix
from tikmix_fast.cli.report import report

__all__ = ["app"]

app = typer.Typer(
    help="Learn while a language model trains which data helps it, and move the data mixture accordingly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(demo)
app.command()(influence)
app.command()(mix)
app.command()(bench)
app.command()(report)
app.command()(env)
