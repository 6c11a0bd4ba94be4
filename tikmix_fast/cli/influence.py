"""``tikmix-fast influence``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tikmix_fast.cli.folders import make_folder
from tikmix_fast.cli.mistakes import user_mistakes

if TYPE_CHECKING:
    from rich.console import Console

    from tikmix_fast.checkpoints.checkpoint_influence import CheckpointInfluence
    from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

__all__ = ["influence"]


def influence(
    model: Annotated[
        Path,
        typer.Option(help="Folder of a transformers checkpoint (safetensors); or a config.json, for random weights."),
    ],
    domain: Annotated[
        list[str],
        typer.Option(metavar="NAME=PATH", help="Text or tokens: a file, a folder or a 'pattern'. Once per domain."),
    ],
    task: Annotated[list[str], typer.Option(metavar="NAME=PATH", help="The same for a task. Once per task.")],
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("tikmix-influence"),
    tokenizer: Annotated[
        str, typer.Option(help="Folder with tokenizer.json, or 'bytes'; 'auto' is the model's own.")
    ] = "auto",
    token_dtype: Annotated[
        Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"] | None,
        typer.Option(help="Of .bin files without .idx, which do not tell: uint16 in most files of nanoGPT."),
    ] = None,
    preconditioner: Annotated[
        Literal["identity", "adam", "ekfac", "diagonal_fisher"] | None,
        typer.Option(help="P. Default: adam where --optimizer is given, else identity."),
    ] = None,
    optimizer: Annotated[
        Path | None, typer.Option(help="Adam's moments, as tikmix_fast.checkpoints.adam_files.save_adam writes them.")
    ] = None,
    damping: Annotated[float, typer.Option(help="Of ekfac and diagonal_fisher, times the mean eigenvalue.")] = 0.1,
    projection: Annotated[
        int | None, typer.Option(help="Side of random projections: less time and memory, more error. Default: exact.")
    ] = None,
    projection_kind: Annotated[Literal["countsketch", "rademacher", "gaussian"], typer.Option()] = "countsketch",
    tokens: Annotated[int, typer.Option(help="Measured per domain, at most.")] = 65536,
    rel_error: Annotated[
        float | None, typer.Option(help="Stop earlier: when errors are this share of the spread over domains.")
    ] = None,
    task_tokens: Annotated[int, typer.Option(help="Measured per task, at most.")] = 32768,
    fit_tokens: Annotated[int, typer.Option(help="To fit ekfac or diagonal_fisher, of all domains.")] = 65536,
    length: Annotated[int | None, typer.Option(help="Tokens per sequence. Default: 512, or the model's most.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences per micro-batch.")] = 8,
    task_splits: Annotated[
        int, typer.Option(help="Gradients kept per task: from 2 on, errors know the task's part; more, better known.")
    ] = 4,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of parameters to leave out; again for more.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights; auto: as saved.")
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of text, projections, and random weights.")] = 0,
    save_every: Annotated[int, typer.Option(help="Micro-batches between two saves, to go on from when killed.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure the influence of every domain on every task, at a checkpoint.

    Nothing is downloaded, no pickle is loaded, and no code of the checkpoint is run. A run that was killed goes on when
    the same command is given again.
    """
    import json
    import os

    from rich.console import Console

    from tikmix_fast import files

    console = Console(stderr=True)
    with user_mistakes():
        domains, tasks = _named("domain", domain), _named("task", task)
        make_folder(out)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with console.status("loading torch"):
            import torch

            from tikmix_fast.checkpoints.checkpoint_influence import CheckpointInfluence, CheckpointSettings
            from tikmix_fast.report.environment import describe_environment
        if threads:
            torch.set_num_threads(threads)
        settings = CheckpointSettings(
            model=str(model),
            domains=domains,
            tasks=tasks,
            tokenizer=tokenizer,
            token_dtype=token_dtype,
            preconditioner=preconditioner or ("identity" if optimizer is None else "adam"),
            optimizer=None if optimizer is None else str(optimizer),
            damping=damping,
            projection=projection,
            projection_kind=projection_kind,
            tokens=tokens,
            task_tokens=task_tokens,
            fit_tokens=fit_tokens,
            rel_error=rel_error,
            length=length,
            batch=batch,
            task_splits=task_splits,
            exclude=tuple(exclude or ()),
            dtype=dtype,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            seed=seed,
            save_every=save_every,
        )
        with console.status("loading model and text"):
            measurement = CheckpointInfluence(settings, out)
        memory = measurement.describe_memory()
        resolved = {**measurement.settings.to_dict(), "threads": torch.get_num_threads()}
        files.write_json(out / "settings.json", resolved)
    console.print(f"memory: {memory}", highlight=False, soft_wrap=True)
    if measurement.resumed:
        console.print(f"going on after {measurement.resumed} micro-batches", highlight=False)
    matrix = _measure(measurement, console)
    with user_mistakes():
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
    measurement.finish()
    for warning in measurement.warnings:
        console.print(f"[bold yellow]warning:[/] {_plain(warning)}", highlight=False, soft_wrap=True)
    if as_json:
        significant = matrix.significant(correction="bh").tolist()
        summary = {"folder": str(out), "significant": significant, **run, "matrix": matrix.to_dict()}
        typer.echo(json.dumps(summary, indent=1))
        return
    from tikmix_fast.report.influence_table import influence_table

    Console(highlight=False).print(influence_table(matrix))
    seconds = ", ".join(f"{what} {taken:.1f} s" for what, taken in measurement.seconds.items())
    for line in (
        f"{matrix.tokens.sum():.0f} tokens of domains; {seconds}",
        f"numbers: {out}/influence.json",
        f"next: tikmix-fast mix {out}/influence.json; tikmix-fast report {out}",
    ):
        typer.echo(line)


def _named(option: str, given: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for each in given:
        name, equals, path = each.partition("=")
        if not equals or not name.strip() or not path:
            raise ValueError(f"{option} must be NAME=PATH; got {each!r}")
        if name.strip() in named:
            raise ValueError(f"{option} {name.strip()!r} is given twice: every name once")
        named[name.strip()] = path
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
