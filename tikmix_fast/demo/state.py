"""The state of a demonstration in a file, so that a killed run can continue."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tikmix_fast.arguments import require_int
from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.corpora import Corpora
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.tensor_files import read_state, write_tensors

__all__ = ["DemoState"]

_FORMAT = "tikmix_fast.demo_state"


class DemoState:
    """A file with the progress of `demonstrate`. The constructor reads and checks an existing file.

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
        If it is damaged, of another kind, or of a run with other settings or text; the message names it.
    """

    def __init__(self, path: str | os.PathLike[str], settings: DemoSettings, corpora: Corpora, every: int = 10) -> None:
        self.path, self.every = Path(path), require_int("every", every, 1)
        self._of = {"settings": json.loads(json.dumps(settings.to_dict())), "text": corpora.digest()}
        self._tensors: dict[str, Tensor] = {}
        self.progress: dict[str, Any] | None = None
        if self.path.exists():
            self._tensors, content = read_state(self.path, _FORMAT, self._of)
            self.progress = content["progress"]

    def write(self, arms: Mapping[str, Arm], progress: Mapping[str, Any]) -> None:
        """Write the arms, and ``progress`` as JSON."""
        tensors = {f"{arm}/{name}": value for arm, each in arms.items() for name, value in each.tensors().items()}
        counters = {name: each.counters() for name, each in arms.items()}
        write_tensors(self.path, _FORMAT, tensors, {"of": self._of, "progress": {**progress, "arms": counters}})

    def restore(self, name: str, arm: Arm) -> bool:
        """Restore an arm; return False if the file has none of this name."""
        if self.progress is None or name not in self.progress["arms"]:
            return False
        own = {key.removeprefix(f"{name}/"): each for key, each in self._tensors.items() if key.startswith(f"{name}/")}
        arm.restore(own, self.progress["arms"][name])
        return True

    def delete(self) -> None:
        """Delete the file; call this after the results were written."""
        self.path.unlink(missing_ok=True)
