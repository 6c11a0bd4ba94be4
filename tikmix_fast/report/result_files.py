"""Read the files that a report can show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tikmix_fast import files
from tikmix_fast.demo.results import DemoResult
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.mixture.schedule.dynamic import DynamicMixture

__all__ = ["Sources", "read_sources"]


@dataclass
class Sources:
    """The contents of the files, each with the name that the report gives it.

    Attributes
    ----------
    demos : list of (str, DemoResult)
    matrices : list of (str, InfluenceMatrix)
    mixtures : list of (str, mapping)
        Files of ``tikmix-fast mix``.
    schedules : list of (str, DynamicMixture)
        Files of `DynamicMixture.save`.
    runs : list of (str, mapping)
        Files ``run.json`` of ``tikmix-fast influence``.
    """

    demos: list[tuple[str, DemoResult]] = field(default_factory=list)
    matrices: list[tuple[str, InfluenceMatrix]] = field(default_factory=list)
    mixtures: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    schedules: list[tuple[str, DynamicMixture]] = field(default_factory=list)
    runs: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)


def read_sources(paths: Iterable[Path]) -> Sources:
    """Read JSON files, and the JSON files in folders. Files of unknown kinds in folders do not count.

    The results of a demonstration already hold its matrix, so the matrix file beside them does not count either.

    Raises
    ------
    OSError
        If a path is missing.
    ValueError
        If a file is damaged or of an unknown kind, or if the folders hold nothing to show; the message names the path.
    """
    sources = Sources()
    paths = list(paths)
    for path in paths:
        if path.is_dir():
            for folder in (path, *sorted(each for each in path.iterdir() if each.is_dir())):
                has_demo = (folder / "results.json").is_file()
                for file in sorted(folder.glob("*.json")):
                    if not (has_demo and file.name == "influence.json"):
                        _add(sources, file, required=False)
        else:
            _add(sources, path, required=True)
    if not any(vars(sources).values()):
        raise ValueError(
            "paths must lead to files that demo, influence, mix or DynamicMixture.save wrote; "
            f"none in {', '.join(map(str, paths))}"
        )
    return sources


def _add(sources: Sources, path: Path, required: bool) -> None:
    content = files.read_json(path)
    kind = content.get("format") if isinstance(content, dict) else None
    with files.naming(path):
        if kind == "tikmix_fast.demo":
            sources.demos.append((path.parent.name, DemoResult.from_dict(content)))
        elif kind == "tikmix_fast.influence_matrix":
            sources.matrices.append((str(path), InfluenceMatrix.from_dict(content)))
        elif kind == "tikmix_fast.influence_run":
            sources.runs.append((str(path), _checked(content, {"settings": dict, "seconds": dict, "warnings": list})))
        elif kind == "tikmix_fast.dynamic_mixture":
            sources.schedules.append((str(path), _schedule(content)))
        elif isinstance(content, dict) and {"weights", "prior", "predicted", "message"} <= set(content):
            lists = {"domains": list, "prior": list, "warnings": list, "weights": dict, "message": str}
            sources.mixtures.append((str(path), _checked(content, lists)))
        elif required:
            raise ValueError("not an influence matrix, a mixture, a schedule, a run or a demonstration's results")


def _schedule(content: dict[str, Any]) -> DynamicMixture:
    """Return the schedule with this state; loading the state checks all of it."""
    state = _checked(content, {"domains": list, "steps": int, "boundaries": list, "warm_up": dict, "history": list})
    settings = {name: state[name] for name in ("domains", "steps", "boundaries", "warm_up")}
    schedule = DynamicMixture(**settings)
    schedule.load_state_dict(state)
    return schedule


def _checked(content: dict[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{name!r} must be a {kind.__name__}")
    return content
