"""Results of a demonstration, and their file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tikmix_fast import files
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

__all__ = ["ArmResult", "Boundary", "DemoResult"]

_FORMAT = "tikmix_fast.demo"
_VERSION = 1

ByName = dict[str, float]


@dataclass
class ArmResult:
    """Result of one training run.

    Attributes
    ----------
    losses : list of (int, dict of str to float)
        Number of steps, and each task's loss in nats per byte on a part of its ``report`` text.
    final : dict of str to float
        Each task's loss after the last step, on its whole ``report`` text.
    weights : list of (int, dict of str to float)
        First step of a mixture, and the mixture.
    drawn : dict of str to int
        Number of training sequences, by domain.
    parameters : str
        SHA-256 of the parameters after the last step; equal for runs that end with the same bits.
    """

    losses: list[tuple[int, ByName]] = field(default_factory=list)
    final: ByName = field(default_factory=dict)
    weights: list[tuple[int, ByName]] = field(default_factory=list)
    drawn: dict[str, int] = field(default_factory=dict)
    parameters: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "losses": [{"step": step, "tasks": losses} for step, losses in self.losses],
            "final": self.final,
            "weights": [{"step": step, "domains": weights} for step, weights in self.weights],
            "drawn": self.drawn,
            "parameters": self.parameters,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ArmResult:
        """Read what `to_dict` returned."""
        return cls(
            losses=[(each["step"], each["tasks"]) for each in content["losses"]],
            final=content["final"],
            weights=[(each["step"], each["domains"]) for each in content["weights"]],
            drawn=content["drawn"],
            parameters=content["parameters"],
        )


@dataclass
class Boundary:
    """One change of the mixture.

    Attributes
    ----------
    step : int
    matrix : InfluenceMatrix
        Measured at this step.
    weights : dict of str to float
        Mixture that TiKMiX-D made from it.
    message : str
        The solver's message.
    success : bool
    """

    step: int
    matrix: InfluenceMatrix
    weights: ByName
    message: str
    success: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "step": self.step,
            "weights": self.weights,
            "success": self.success,
            "message": self.message,
            "matrix": self.matrix.to_dict(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Boundary:
        """Read what `to_dict` returned."""
        return cls(**{**content, "matrix": InfluenceMatrix.from_dict(content["matrix"])})


@dataclass
class DemoResult:
    """Results of both arms of one seed.

    Attributes
    ----------
    settings : DemoSettings
    tikmix, uniform : ArmResult
    boundaries : list of Boundary
    steered, held_out : tuple of str
        Names of the tasks.
    sources : dict of str to str
        Origin of the text of each domain and task.
    text_bytes : dict of str to int
        Size of each domain.
    missing : dict of str to str
        Domains and tasks that the installation lacked, each with the reason.
    seconds : dict of str to float
        Wall time by kind of work.
    rows : dict of str to int
        Number of training sequences per arm, and of measured sequences.
    environment : dict
        Versions, machine, commit; plain JSON types.
    """

    settings: DemoSettings
    tikmix: ArmResult
    uniform: ArmResult
    boundaries: list[Boundary]
    steered: tuple[str, ...]
    held_out: tuple[str, ...]
    sources: dict[str, str]
    text_bytes: dict[str, int]
    missing: dict[str, str]
    seconds: dict[str, float]
    rows: dict[str, int]
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains."""
        return tuple(self.text_bytes)

    def change(self, tasks: tuple[str, ...]) -> float:
        """Return the relative change of the mean loss of ``tasks`` from uniform to TiKMiX-D; negative is better."""
        ours, theirs = (np.mean([arm.final[task] for task in tasks]) for arm in (self.tikmix, self.uniform))
        return float(ours / theirs - 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "settings": self.settings.to_dict(),
            "environment": self.environment,
            "steered": list(self.steered),
            "held_out": list(self.held_out),
            "arms": {name: getattr(self, name).to_dict() for name in ("tikmix", "uniform")},
            "boundaries": [each.to_dict() for each in self.boundaries],
            "sources": self.sources,
            "text_bytes": self.text_bytes,
            "missing": self.missing,
            "seconds": self.seconds,
            "rows": self.rows,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DemoResult:
        """Read what `to_dict` returned.

        Raises
        ------
        ValueError
            If the content is not of a demonstration, or lacks a field.
        """
        if not isinstance(content, Mapping) or content.get("format") != _FORMAT or content.get("version") != _VERSION:
            raise ValueError(f"not the result of a demonstration: 'format' must be {_FORMAT!r}, 'version' {_VERSION}")
        try:
            return cls(
                settings=DemoSettings.from_dict(content["settings"]),
                tikmix=ArmResult.from_dict(content["arms"]["tikmix"]),
                uniform=ArmResult.from_dict(content["arms"]["uniform"]),
                boundaries=[Boundary.from_dict(each) for each in content["boundaries"]],
                steered=tuple(content["steered"]),
                held_out=tuple(content["held_out"]),
                **{
                    name: content[name]
                    for name in ("sources", "text_bytes", "missing", "seconds", "rows", "environment")
                },
            )
        except KeyError as error:
            raise ValueError(f"the result of a demonstration lacks the field {error.args[0]!r}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as JSON with a checksum, atomically; return the path."""
        return files.write_sealed_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DemoResult:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            If the file is not JSON, not of a demonstration, or damaged; the message names it.
        """
        content = files.read_json(path)
        with files.naming(path):
            return cls.from_dict(content)
