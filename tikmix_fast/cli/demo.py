"""``tikmix-fast demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tikmix_fast.cli.folders import make_folder
from tikmix_fast.cli.options import AsJson
from tikmix_fast.cli.user_mistakes import user_mistakes

if TYPE_CHECKING:
    from rich.console import Console

    from tikmix_fast.demo.corpora import Corpora
    from tikmix_fast.demo.results import DemoResult
    from tikmix_fast.demo.settings import DemoSettings
    from tikmix_fast.demo.state import DemoState

__all__ = ["demo"]

_MOST_THREADS = 4
"""More threads do not help so small a model, and slow it down on large machines."""

_QUICK: dict[str, Any] = {
    "steps": 60,
    "stages": 3,
    "evaluate_every": 20,
    "warm_up": 10,
    "task_batches": 4,
    "task_rows": 4,
    "domain_batches": 6,
    "curve_rows": 16,
    "domain_bytes": 100_000,
    "task_bytes": 16_000,
}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and pictures.")] = Path("tikmix-demo"),
    seed: Annotated[int, typer.Option(help="Seed of weights and data; both arms share it.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds to run, from --seed on.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps per arm.")] = None,
    stages: Annotated[int | None, typer.Option(help="Parts of the training; the mixture changes between them.")] = None,
    diversity: Annotated[float | None, typer.Option(help="Factor of the entropy; smaller moves further.")] = None,
    preconditioner: Annotated[str | None, typer.Option(help="adam or identity.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A short run: it shows the steps, but no gain.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice, at most 4.")] = None,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps between two saves; a killed run continues from the last.")
    ] = 10,
    as_json: AsJson = False,
) -> None:
    """Train a small GPT on a mixture that follows Group Influence, and its twin on a uniform one. Needs no download.

    The text comes from installed packages: Python's own sources and reference, headers, docstrings, licences. The run
    takes some minutes on two cores. After a kill, the same command continues.
    """
    import dataclasses

    from rich.console import Console

    console = Console(stderr=True)
    options = {"steps": steps, "stages": stages, "diversity": diversity, "preconditioner": preconditioner}
    given = {name: value for name, value in options.items() if value is not None}
    with user_mistakes():
        settings, corpora = _prepare({**(_QUICK if quick else {}), "seed": seed, **given}, seeds, threads, out, console)
    for name, reason in corpora.missing.items():
        console.print(f"[bold yellow]missing:[/] {name}: {reason}", highlight=False)
    from tikmix_fast.demo.state import DemoState
    from tikmix_fast.report.environment import describe_environment

    environment = describe_environment()
    results, states = [], []
    for number in range(seed, seed + seeds):
        folder = out if seeds == 1 else out / f"seed-{number}"
        own = dataclasses.replace(settings, seed=number)
        with user_mistakes():
            folder.mkdir(exist_ok=True)
            states.append(DemoState(folder / "resume.safetensors", own, corpora, save_every))
        result = _run(own, corpora, console, states[-1])
        result.environment = environment
        with user_mistakes():
            _write(result, folder)
        results.append(result)
    for state in states:
        state.delete()
    if as_json:
        _print_json(results, out)
    else:
        _print_tables(results, out)


def _prepare(
    options: dict[str, Any], seeds: int, threads: int | None, out: Path, console: Console
) -> tuple[DemoSettings, Corpora]:
    """Check every option, write the settings, and read the text."""
    import os

    from tikmix_fast import files

    make_folder(out)
    # OpenMP reads this when torch loads it. Threads that spin while they wait slow so small a model several times down
    # as soon as another process needs the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with console.status("loading torch"):
        import torch

        from tikmix_fast.demo.corpora import gather
        from tikmix_fast.demo.settings import DemoSettings
    settings = DemoSettings(**options)
    torch.set_num_threads(threads or min(torch.get_num_threads(), _MOST_THREADS))
    _check_backend()
    resolved = {**settings.to_dict(), "seeds": seeds, "threads": torch.get_num_threads()}
    files.write_json(out / "settings.json", resolved)
    with console.status("gathering text"):
        return settings, gather(domain_bytes=settings.domain_bytes, task_bytes=settings.task_bytes)


def _check_backend() -> None:
    """Run the kernel once, so that a backend that cannot run fails now and not after minutes."""
    import torch

    from tikmix_fast import ops

    one = torch.ones(1, 1)
    ops.group_influence(one, one, torch.tensor([0, 1]), one[None])


def _run(settings: DemoSettings, corpora: Corpora, console: Console, state: DemoState) -> DemoResult:
    from rich import progress
    from rich.text import Text

    from tikmix_fast.demo.demonstration import demonstrate, work

    class Rate(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            return Text(f"{(task.speed or 0) * settings.model.length / 1000:.0f} kB/s")

    columns = (
        progress.TextColumn("seed {task.fields[seed]}: {task.description:10}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        Rate(),
        progress.TextColumn("time left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, speed_estimate_period=60) as bar:
        task = bar.add_task("both arms", total=work(settings, corpora), seed=settings.seed)

        def show(what: str, amount: float) -> None:
            bar.update(task, description=what, advance=amount)

        return demonstrate(settings, corpora, show, state)


def _write(result: DemoResult, folder: Path) -> None:
    from tikmix_fast.report.pictures import draw_influence, draw_losses, draw_mixture, save_figure

    result.save(folder / "results.json")
    last = result.boundaries[-1]
    last.matrix.save(folder / "influence.json")
    save_figure(draw_influence(last.matrix, f"Group Influence at step {last.step}"), folder / "influence.png")
    save_figure(draw_mixture(result), folder / "mixture.png")
    save_figure(draw_losses(result), folder / "loss.png")


def _print_tables(results: list[DemoResult], out: Path) -> None:
    from rich.console import Console

    from tikmix_fast.report.tables import loss_table, weight_table

    console = Console(highlight=False)
    console.print(loss_table(results))
    mixtures = {"uniform": results[0].uniform.weights[-1][1]} | {
        f"seed {each.settings.seed}, last stage": each.tikmix.weights[-1][1] for each in results
    }
    console.print(weight_table(mixtures))
    for each in results:
        times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in each.seconds.items())
        console.print(f"seed {each.settings.seed}: {times}")
    folder = out if len(results) == 1 else out / f"seed-{results[0].settings.seed}"
    for line in (
        f"pictures: {folder}/influence.png, {folder}/mixture.png, {folder}/loss.png",
        f"numbers: {folder}/results.json",
        f"next: tikmix-fast mix {folder}/influence.json --diversity 0.3",
    ):
        console.print(line, soft_wrap=True)


def _print_json(results: list[DemoResult], out: Path) -> None:
    import json

    summary = {
        "folder": str(out),
        "seeds": [
            {
                "seed": each.settings.seed,
                "uniform": each.uniform.final,
                "tikmix": each.tikmix.final,
                "change_steered": each.change(each.steered),
                "change_held_out": each.change(each.held_out),
                "weights": each.tikmix.weights[-1][1],
                "seconds": each.seconds,
            }
            for each in results
        ],
        "missing": results[0].missing,
    }
    typer.echo(json.dumps(summary, indent=1))
