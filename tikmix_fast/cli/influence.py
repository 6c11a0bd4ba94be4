"""``tikmix-fast influence``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tikmix_fast.cli.folders import make_folder
from tikmix_fast.cli.options import AsJson, Threads
from tikmix_fast.cli.user_mistakes import user_mistakes

if TYPE_CHECKING:
    from rich.console import Console

    from tikmix_fast.checkpoints.checkpoint_influence import CheckpointInfluence
    from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

__all__ = ["influence"]


Model = Annotated[
    Path,
    typer.Option(help="Folder of a transformers checkpoint (safetensors), or a config.json for random weights."),
]
Domains = Annotated[
    list[str],
    typer.Option(metavar="NAME=PATH", help="Text or tokens: a file, a folder or a 'pattern'. Once per domain."),
]
Tasks = Annotated[list[str], typer.Option(metavar="NAME=PATH", help="The same for a task. Once per task.")]
Out = Annotated[Path, typer.Option(help="Folder for results.")]
TokenizerName = Annotated[str, typer.Option(help="Folder with tokenizer.json, or 'bytes'; 'auto': the model's own.")]
TokenDtype = Annotated[
    Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"] | None,
    typer.Option(help="Dtype of .bin files without .idx; uint16 in most files of nanoGPT."),
]
PreconditionerName = Annotated[
    Literal["identity", "adam", "ekfac", "diagonal_fisher"] | None,
    typer.Option(help="P. Default: adam if --optimizer is given, else identity."),
]
OptimizerFile = Annotated[
    Path | None, typer.Option(help="Adam's moments, as tikmix_fast.checkpoints.adam_files.save_adam writes them.")
]
Damping = Annotated[float, typer.Option(help="For ekfac and diagonal_fisher, in units of the mean eigenvalue.")]
ProjectionSide = Annotated[
    int | None, typer.Option(help="Side of random projections: less time and memory, more error. Default: exact.")
]
Kind = Annotated[Literal["countsketch", "rademacher", "gaussian"], typer.Option(help="Kind of random projection.")]
Tokens = Annotated[int, typer.Option(help="Most tokens to measure per domain.")]
TaskTokens = Annotated[int, typer.Option(help="Most tokens to measure per task.")]
FitTokens = Annotated[int, typer.Option(help="Tokens, from all domains together, that fit ekfac or diagonal_fisher.")]
RelError = Annotated[
    float | None, typer.Option(help="Stop earlier: when errors are at most this share of the spread over domains.")
]
Length = Annotated[int | None, typer.Option(help="Tokens per sequence. Default: 512, or the model's limit if lower.")]
Batch = Annotated[int, typer.Option(help="Sequences per micro-batch.")]
TaskSplits = Annotated[
    int, typer.Option(help="Gradients per task. From 2 on, error bars include the task's noise; more: better known.")
]
Exclude = Annotated[list[str] | None, typer.Option(help="Pattern of parameters to leave out. Once per pattern.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Dtype of the weights; auto: as saved.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda if there is one.")]
Seed = Annotated[int, typer.Option(help="Seed for the choice of text, projections, and random weights.")]
SaveEvery = Annotated[int, typer.Option(help="Micro-batches between two saves; a killed run continues from the last.")]


def influence(
    model: Model,
    domain: Domains,
    task: Tasks,
    out: Out = Path("tikmix-influence"),
    tokenizer: TokenizerName = "auto",
    token_dtype: TokenDtype = None,
    preconditioner: PreconditionerName = None,
    optimizer: OptimizerFile = None,
    damping: Damping = 0.1,
    projection: ProjectionSide = None,
    projection_kind: Kind = "countsketch",
    tokens: Tokens = 65536,
    rel_error: RelError = None,
    task_tokens: TaskTokens = 32768,
    fit_tokens: FitTokens = 65536,
    length: Length = None,
    batch: Batch = 8,
    task_splits: TaskSplits = 4,
    exclude: Exclude = None,
    dtype: Dtype = "auto",
    device: Device = None,
    threads: Threads = None,
    seed: Seed = 0,
    save_every: SaveEvery = 20,
    as_json: AsJson = False,
) -> None:
    """Measure the influence of every domain on every task, at a checkpoint.

    The command downloads nothing, loads no pickle, and runs no code of the checkpoint. After a kill, the same command
    continues.
    """
    options = dict(locals())
    for name in ("domain", "task", "out", "device", "threads", "as_json"):
        del options[name]
    with user_mistakes():
        options.update(
            model=str(model),
            domains=_named("domain", domain),
            tasks=_named("task", task),
            preconditioner=preconditioner or ("identity" if optimizer is None else "adam"),
            optimizer=None if optimizer is None else str(optimizer),
            exclude=tuple(exclude or ()),
        )
    _influence(options, device, threads, out, as_json)


def _influence(options: dict[str, Any], device: str | None, threads: int | None, out: Path, as_json: bool) -> None:
    from rich.console import Console

    from tikmix_fast import files

    console = Console(stderr=True)
    with user_mistakes():
        measurement, resolved = _read(options, device, threads, out, console)
        memory = measurement.describe_memory()
        files.write_json(out / "settings.json", resolved)
    console.print(f"memory: {memory}", highlight=False, soft_wrap=True)
    if measurement.resumed:
        console.print(f"continuing after {measurement.resumed} micro-batches", highlight=False)
    matrix = _measure(measurement, console)
    with user_mistakes():
        run = _write(matrix, measurement, resolved, memory, out)
    measurement.finish()
    for warning in measurement.warnings:
        console.print(f"[bold yellow]warning:[/] {_plain(warning)}", highlight=False, soft_wrap=True)
    if as_json:
        _print_json(matrix, run, out)
    else:
        _print_table(matrix, measurement.seconds, out)


def _read(
    options: dict[str, Any], device: str | None, threads: int | None, out: Path, console: Console
) -> tuple[CheckpointInfluence, dict[str, Any]]:
    """Load model and text; return the measurement and every setting as JSON types."""
    import os

    make_folder(out)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with console.status("loading torch"):
        import torch

        from tikmix_fast.checkpoints.checkpoint_influence import CheckpointInfluence
        from tikmix_fast.checkpoints.settings import CheckpointSettings
    if threads:
        torch.set_num_threads(threads)
    settings = CheckpointSettings(**options, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with console.status("loading model and text"):
        measurement = CheckpointInfluence(settings, out)
    return measurement, {**measurement.settings.to_dict(), "threads": torch.get_num_threads()}


def _write(
    matrix: InfluenceMatrix, measurement: CheckpointInfluence, resolved: dict[str, Any], memory: str, out: Path
) -> dict[str, Any]:
    from tikmix_fast import files
    from tikmix_fast.report.environment import describe_environment

    matrix.save(out / "influence.json")
    run = {
        "format": "tikmix_fast.influence_run",
        "version": 1,
        "settings": resolved,
        "memory": memory,
        "seconds": measurement.seconds,
        "warnings": measurement.warnings,
        "environment": describe_environment(),
    }
    files.write_sealed_json(out / "run.json", run)
    return run


def _print_json(matrix: InfluenceMatrix, run: dict[str, Any], out: Path) -> None:
    import json

    significant = matrix.significant(correction="bh").tolist()
    summary = {"folder": str(out), "significant": significant, **run, "matrix": matrix.to_dict()}
    typer.echo(json.dumps(summary, indent=1))


def _print_table(matrix: InfluenceMatrix, seconds: dict[str, float], out: Path) -> None:
    from rich.console import Console

    from tikmix_fast.report.influence_table import influence_table

    Console(highlight=False).print(influence_table(matrix))
    times = ", ".join(f"{stage} {duration:.1f} s" for stage, duration in seconds.items())
    for line in (
        f"{matrix.tokens.sum():.0f} tokens of domains; {times}",
        f"numbers: {out}/influence.json",
        f"next: tikmix-fast mix {out}/influence.json; tikmix-fast report {out}",
    ):
        typer.echo(line)


def _named(option: str, pairs: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        name = name.strip()
        if not equals or not name or not path:
            raise ValueError(f"{option} must be NAME=PATH; got {pair!r}")
        if name in named:
            raise ValueError(f"{option} must have every name once; got {name!r} twice")
        named[name] = path
    return named


def _measure(measurement: CheckpointInfluence, console: Console) -> InfluenceMatrix:
    import torch
    from rich import progress

    from tikmix_fast.influence.capture.views import UncapturedParameterError
    from tikmix_fast.influence.passes.conservation import ConservationError

    columns: tuple[Any, ...] = (
        progress.TextColumn("{task.description:8}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("time left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console) as bar:
        shown = bar.add_task("", total=measurement.work)
        try:
            return measurement.measure(lambda what, amount: bar.update(shown, description=what, advance=amount))
        except (UncapturedParameterError, ConservationError, FloatingPointError, torch.OutOfMemoryError) as error:
            typer.echo(f"no result: {error}", err=True)
            raise typer.Exit(1) from None


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
