"""``tikmix-fast report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tikmix_fast.cli.user_mistakes import user_mistakes

__all__ = ["report"]


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="Folders or JSON files that demo, influence, mix or DynamicMixture wrote."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("tikmix-report.html"),
    title: Annotated[str, typer.Option(help="The title of the page.")] = "Data influence and mixture",
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts of what the page shows as JSON.")] = False,
) -> None:
    """Write one HTML file that shows results: heat map, mixture over time, losses, costs, settings, warnings.

    The page needs no network, follows the reader's dark mode, and fits a phone.
    """
    import json

    from tikmix_fast import files
    from tikmix_fast.report.page import make_page
    from tikmix_fast.report.result_files import read_sources

    with user_mistakes():
        sources = read_sources(paths)
        files.write_text(out, make_page(sources, title))
    counts = {
        "measurements": len(sources.runs),
        "matrices": len(sources.matrices),
        "mixtures": len(sources.mixtures),
        "schedules": len(sources.schedules),
        "training runs": len(sources.demos),
    }
    if as_json:
        typer.echo(json.dumps({"file": str(out), **counts}, indent=1))
    else:
        shown = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        typer.echo(f"{out}: {shown}")
