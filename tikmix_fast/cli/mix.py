"""``tikmix-fast mix``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tikmix_fast.cli.options import AsJson
from tikmix_fast.cli.user_mistakes import user_mistakes

if TYPE_CHECKING:
    from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

__all__ = ["mix"]


MatrixFile = Annotated[
    Path, typer.Argument(metavar="S.json", help="An influence matrix, as the demo or InfluenceMatrix.save writes it.")
]
Prior = Annotated[
    str,
    typer.Option(help="The current mixture: name=weight,name=weight,... or a JSON file {name: weight}, or 'uniform'."),
]
Uniformity = Annotated[float, typer.Option(help="Factor of the spread over tasks (alpha).")]
Influence = Annotated[float, typer.Option(help="Factor of the summed influence (beta).")]
Diversity = Annotated[float, typer.Option(help="Factor of the entropy (gamma); smaller moves further.")]
Floor = Annotated[str, typer.Option(help="Smallest weight: a number for all, or name=weight,...")]
Cap = Annotated[str, typer.Option(help="Largest weight: a number for all, or name=weight,...")]
MaxKL = Annotated[float | None, typer.Option(help="Largest KL divergence from the prior, in nats.")]
Smoothing = Annotated[float, typer.Option(help="Share of the prior in the answer, 0 to 1.")]
Confidence = Annotated[
    float | None, typer.Option(help="Move only as far as the influence is known, with this confidence, 0 to 1.")
]
Pareto = Annotated[bool, typer.Option(help="Predict that no task does worse than under the prior.")]
Out = Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")]


def mix(
    matrix_file: MatrixFile,
    prior: Prior = "uniform",
    uniformity: Uniformity = 1.0,
    influence: Influence = 1.0,
    diversity: Diversity = 1.0,
    floor: Floor = "0",
    cap: Cap = "1",
    max_kl: MaxKL = None,
    smoothing: Smoothing = 0.0,
    confidence: Confidence = None,
    pareto: Pareto = True,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Solve for a new mixture from a saved influence matrix, by TiKMiX-D."""
    from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

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
    _mix(matrix, matrix_file, options, out, as_json)


def _mix(matrix: InfluenceMatrix, matrix_file: Path, options: dict[str, Any], out: Path | None, as_json: bool) -> None:
    import json
    import warnings

    from tikmix_fast import files
    from tikmix_fast.mixture.direct.tikmix_d import tikmix_d

    with user_mistakes():
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
        content = files.read_json(given)  # no checksum needed: people write such files by hand
    except FileNotFoundError:
        raise ValueError(f"prior must be 'uniform', name=weight,... or a JSON file; got {given!r}") from None
    except ValueError as error:
        raise ValueError(f"prior: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"prior: {given} must hold one object {{name: weight}}; got {type(content).__name__}")
    # The output of this command may be the prior of the next stage.
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
