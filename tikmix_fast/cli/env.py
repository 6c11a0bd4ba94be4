"""``tikmix-fast env``."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["env"]


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, machine and backends, and why a backend is missing."""
    import json

    from tikmix_fast.report.environment import describe_environment

    found = describe_environment()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("[bold]tikmix_fast[/]", found["tikmix_fast"])
    table.add_row("commit", found["commit"] or "none (not a source checkout)")
    table.add_row("python", found["python"])
    sections = {"packages": found["packages"], "machine": found["machine"], "environment variables": found["variables"]}
    for title, entries in sections.items():
        table.add_row()
        table.add_row(f"[bold]{title}[/]")
        for name, value in entries.items():
            table.add_row(f"  {name}", escape(str(value)))
        if not entries:
            table.add_row("  none set")
    table.add_row()
    table.add_row("[bold]backends[/]")
    if isinstance(found["backends"], dict):
        for name, reason in found["backends"].items():
            table.add_row(f"  {name}", "[green]usable[/]" if reason is None else f"[yellow]no:[/] {escape(reason)}")
    else:
        table.add_row("  ops", escape(str(found["backends"])))
    Console().print(table)
