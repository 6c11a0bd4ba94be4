"""``tikmix-fast mix``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tikmix_fast.cli.mistakes import user_mistakes

if TYPE_CHECKING:
    from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

__all__ = ["mix"]


def mix(
    matrix_file: Annotated[
        Path,
        typer.Argument(metavar="S.json", help="An influence matrix, as the demo or InfluenceMatrix.save writes it."),
    ],
    prior: Annotated[
        str,
        typer.Option(
            help="The mixture in use now: name=weight,name=weight,... or a JSON file {name: weight}, or 'uniform'."
        ),
    ] = "uniform",
    uniformity: Annotated[float, typer.Option(help="Factor of the spread over tasks (alpha).")] = 1.0,
    influence: Annotated[float, typer.Option(help="Factor of the summed influence (beta).")] = 1.0,
    diversity: Annotated[float, typer.Option(help="Factor of the entropy (gamma); smaller moves further.")] = 1.0,
    floor: Annotated[str, typer.Option(help="Least weight: a number for all, or name=weight,...")] = "0",
    cap: Annotated[str, typer.Option(help="Largest weight: a number for all, or name=weight,...")] = "1",
    max_kl: Annotated[float | None, typer.Option(help="Largest KL divergence from the prior, in nats.")] = None,
    smoothing: Annotated[float, typer.Option(help="Share of the prior in the answer, 0 to 1.")] = 0.0,
    confidence: Annotated[
        float | None, typer.Option(help="Move only as far as the influence is known, with this confidence, 0 to 1.")
    ] = None,
    pareto: Annotated[bool, typer.Option(help="Predict no task to fare worse than under the prior.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Solve for a new mixture from a saved influence matrix, by TiKMiX-D."""
    import json
    import warnings

    from tikmix_fast import files
    from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
    from tikmix_fast.mixture.direct.tikmix_d import tikmix_d

    with user_mistakes():
        matrix = InfluenceMatrix.load(matrix_file)
        options: dict[str, Any] = {
            "prior": _read_prior(prior, matrix),
            "uniformity": uniformity,
            "influence": influence,
            "diversity": diversity,
            "floor": _read_limit("floor", floor),
            "cap": _read_limit("cap", cap),
            "max_kl": max_kl,
            "smoothing": smoothing,
            "confidence": confidence,
            "pareto": pareto,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the result holds them
            result = tikmix_d(matrix, **options)
        content = {
            "format": "tikmix_fast.mixture",
            "version": 1,
            **result.to_dict(),
            "weights": result.as_dict(),
            "matrix": str(matrix_file),
            "settings": options,
        }
        if out is not None:
            files.write_sealed_json(out, content)
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        typer.echo(json.dumps(content, indent=1))
    else:
        from rich.console import Console

        from tikmix_fast.report.tables import weight_table

        Console().print(weight_table({"prior": options["prior"], "TiKMiX-D": content["weights"]}))
        typer.echo(f"{result.message}; effective domains: {result.effective_domains:.1f} of {len(matrix.domains)}")
    if not result.success:
        raise typer.Exit(1)


def _read_prior(given: str, matrix: InfluenceMatrix) -> dict[str, float]:
    from tikmix_fast import files

    if given == "uniform":
        return {name: 1 / len(matrix.domains) for name in matrix.domains}
    if "=" in given:
        return _read_pairs("prior", given)
    try:
        content = files.read_json(given)  # people write it by hand, too: without a checksum
    except FileNotFoundError:
        raise ValueError(f"prior must be 'uniform', name=weight,... or a JSON file; got {given!r}") from None
    except ValueError as error:
        raise ValueError(f"prior: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"prior: {given} must hold one object {{name: weight}}; got {type(content).__name__}")
    # What this command wrote may be the prior of the next stage.
    weights: dict[str, float] = content["weights"] if isinstance(content.get("weights"), dict) else content
    return weights


def _read_limit(option: str, given: str) -> float | dict[str, float]:
    return _read_pairs(option, given) if "=" in given else _read_number(option, given)


def _read_pairs(option: str, given: str) -> dict[str, float]:
    pairs: dict[str, float] = {}
    for pair in given.split(","):
        name, equals, number = pair.rpartition("=")
        name = name.strip()
        if not equals or not name or name in pairs:
            raise ValueError(f"{option} must be name=weight,name=weight,... with every name once; got {given!r}")
        pairs[name] = _read_number(option, number)
    return pairs


def _read_number(option: str, given: str) -> float:
    try:
        return float(given)
    except ValueError:
        raise ValueError(f"{option} must be a number or name=weight,...; got {given!r}") from None
