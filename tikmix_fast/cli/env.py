"""``tikmix-fast env``."""

from __future__ import annotations

import typer

from tikmix_fast.cli.options import AsJson

__all__ = ["env"]


def env(as_json: AsJson = False) -> None:
    """Print versions, machine and backends, and the reason for every missing backend."""
    import json

    from tikmix_fast.report.environment import describe_environment

    facts = describe_environment()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("[bold]tikmix_fast[/]", facts["tikmix_fast"])
    table.add_row("commit", facts["commit"] or "none (not a source checkout)")
    table.add_row("python", facts["python"])
    sections = {"packages": facts["packages"], "machine": facts["machine"], "environment variables": facts["variables"]}
    for title, entries in sections.items():
        table.add_row()
        table.add_row(f"[bold]{title}[/]")
        for name, value in entries.items():
            table.add_row(f"  {name}", escape(str(value)))
        if not entries:
            table.add_row("  none set")
    table.add_row()
    table.add_row("[bold]backends[/]")
    if isinstance(facts["backends"], dict):
        for name, reason in facts["backends"].items():
            table.add_row(f"  {name}", "[green]usable[/]" if reason is None else f"[yellow]no:[/] {escape(reason)}")
    else:
        table.add_row("  ops", escape(str(facts["backends"])))
    Console().print(table)
