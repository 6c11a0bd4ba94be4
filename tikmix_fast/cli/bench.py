"""``tikmix-fast bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tikmix_fast.arguments import require_choice
from tikmix_fast.cli.folders import make_folder
from tikmix_fast.cli.options import AsJson, Threads
from tikmix_fast.cli.user_mistakes import user_mistakes

if TYPE_CHECKING:
    from rich.console import Console

    from tikmix_fast.benchmarking.suites import BenchSettings

__all__ = ["bench"]


def bench(
    suite: Annotated[
        list[str] | None,
        typer.Option(help="ops (the kernels) or engine (training steps); may be given again. Default: both."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("tikmix-bench"),
    size: Annotated[
        Literal["quick", "full", "tiny"],
        typer.Option(help="quick (a minute or two), full (as published), or tiny (only shows that it runs)."),
    ] = "quick",
    rounds: Annotated[int | None, typer.Option(min=1, help="At most this many rounds per comparison.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time limit per comparison; 3 rounds run anyway.")] = None,
    threads: Threads = None,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory too, in a process per number.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure this machine: kernels against torch's ways, and training steps with and without influence.

    Every result is compared with float64 before anything is timed. All methods of a comparison take turns.
    """
    import dataclasses

    from rich.console import Console

    from tikmix_fast import files

    console = Console(stderr=True)
    with user_mistakes():
        make_folder(out)
        with console.status("loading torch"):
            import torch

            from tikmix_fast.benchmarking.suites import SUITES, BenchSettings
        settings = BenchSettings.of(size)
        if rounds is not None:
            settings = dataclasses.replace(settings, rounds=rounds)
        if seconds is not None:
            settings = dataclasses.replace(settings, seconds=seconds)
        chosen = list(dict.fromkeys(suite or SUITES))
        for name in chosen:
            require_choice("suite", name, SUITES)
        if memory:
            settings = dataclasses.replace(settings, weigh=True)
        if threads:
            torch.set_num_threads(threads)
        resolved = {**dataclasses.asdict(settings), "suites": chosen, "threads": torch.get_num_threads()}
        files.write_json(out / "settings.json", resolved)
    results = [_run(name, settings, out, console) for name in chosen]
    if as_json:
        import json

        typer.echo(json.dumps({result["suite"]: result for result in results}, indent=1))
    else:
        _print_tables(results, out)


def _run(name: str, settings: BenchSettings, out: Path, console: Console) -> dict[str, Any]:
    from tikmix_fast import files
    from tikmix_fast.benchmarking.suites import run_suite

    with console.status(name) as status:
        try:
            result = run_suite(name, settings, lambda step: status.update(f"{name}: {step}"))
        except AssertionError as error:  # a method computes wrong numbers on this machine
            typer.echo(f"wrong result: {error}", err=True)
            raise typer.Exit(1) from None
    files.write_json(out / f"{name}.json", result)
    if name == "ops":
        from tikmix_fast.report.pictures import save_figure
        from tikmix_fast.report.roofline import draw_roofline

        save_figure(draw_roofline(result), out / "roofline.png")
    return result


def _print_tables(results: list[dict[str, Any]], out: Path) -> None:
    from rich.console import Console

    from tikmix_fast.report.benchmark_tables import benchmark_facts, benchmark_tables

    console = Console(highlight=False)
    for result in results:
        for table in benchmark_tables(result):
            console.print(table.to_rich())
            console.print()
    console.print(benchmark_facts(results[0]), soft_wrap=True)
    console.print(f"numbers: {out}/*.json", soft_wrap=True)
