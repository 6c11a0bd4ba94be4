"""The state of a demonstration in a file, to go on from after it was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.corpora import Corpora
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.tensor_files import read_tensors, write_tensors

__all__ = ["DemoState"]

_FORMAT = "tikmix_fast.demo_state"


class DemoState:
    """A file in which `demonstrate` keeps how far it is; what is there already is read and checked.

    Parameters
    ----------
    path : path
    settings : DemoSettings
    corpora : Corpora
    every : int
        Optimizer steps between two writes, each of some 20 MB for the model of the default settings.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is damaged, of another kind, or of other settings or text; the message names it.
    """

    def __init__(self, path: str | os.PathLike[str], settings: DemoSettings, corpora: Corpora, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1; got {every}")
        self.path, self.every = Path(path), every
        self._of = {"settings": json.loads(json.dumps(settings.to_dict())), "text": corpora.digest()}
        self._tensors: dict[str, Tensor] = {}
        self.progress: dict[str, Any] | None = None
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        advice = "delete it to begin anew, or use another folder"
        try:
            self._tensors, content = read_tensors(self.path, _FORMAT)
        except ValueError as error:
            raise ValueError(f"{error}; {advice}") from None
        differ = [name for name, mine in self._of.items() if content["of"].get(name) != mine]
        if differ:
            raise ValueError(f"{self.path}: is of an interrupted run with other {' and '.join(differ)}: {advice}")
        self.progress = content["progress"]

    def write(self, arms: Mapping[str, Arm], progress: Mapping[str, Any]) -> None:
        """Write the arms, and ``progress`` as JSON."""
        tensors = {f"{arm}/{name}": value for arm, each in arms.items() for name, value in each.tensors().items()}
        counters = {name: each.counters() for name, each in arms.items()}
        write_tensors(self.path, _FORMAT, tensors, {"of": self._of, "progress": {**progress, "arms": counters}})

    def restore(self, name: str, arm: Arm) -> bool:
        """Put an arm where it was; False if the file has none of this name."""
        if self.progress is None or name not in self.progress["arms"]:
            return False
        own = {key.removeprefix(f"{name}/"): each for key, each in self._tensors.items() if key.startswith(f"{name}/")}
        arm.restore(own, self.progress["arms"][name])
        return True

    def delete(self) -> None:
        """Remove the file: for when the results have been written."""
        self.path.unlink(missing_ok=True)
