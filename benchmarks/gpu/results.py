"""The file that keeps what was measured on one kind of GPU, part by part."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tikmix_fast import files

__all__ = ["PARTS", "GpuResults"]

PARTS = ("tests", "ops", "engine", "profile")
"""In the order in which they are run."""

_SUITE = "gpu"


class GpuResults:
    """Results that are on disk as soon as they are there.

    Every part tells its own commit and date, because parts may come from several runs.

    Parameters
    ----------
    folder : Path
    device : str
        Name of the device, which makes the name of the file.
    """

    def __init__(self, folder: Path, device: str) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        self.path = folder / f"gpu-{slug}.json"
        self._lock = threading.Lock()
        self.content: dict[str, Any] = {"suite": _SUITE, "parts": {}}
        if self.path.exists():
            self.content = _read(self.path)

    def describe(self, **facts: Any) -> None:
        """Keep what holds for all parts of this run: ``device``, ``environment``, ``build``."""
        with self._lock:
            self.content.update(facts)
            self._save()

    def begin(self, part: str, commit: str | None, date: str) -> None:
        """Forget what is there of a part."""
        with self._lock:
            self.content["parts"][part] = {"commit": commit, "date": date, "finished": False, "jobs": {}}
            self._save()

    def put(self, part: str, job: str, content: dict[str, Any]) -> None:
        """Keep what one job of a part has so far; of tests that passed or were skipped, their number."""
        kept = dict(content)
        if "passed" in content:
            kept["passed"] = len(content["passed"])
            kept["skipped"] = dict(Counter(content["skipped"].values()))
        with self._lock:
            self.content["parts"][part]["jobs"][job] = kept
            self._save()

    def finish(self, part: str, seconds: float, finished: bool) -> None:
        """Mark a part as done."""
        with self._lock:
            self.content["parts"][part].update(finished=finished, seconds=seconds)
            self._save()

    def has(self, part: str, commit: str | None) -> bool:
        """Tell whether a part was finished at this very commit; never of one that is unknown or was changed."""
        found = self.content["parts"].get(part)
        known = commit is not None and "with changes" not in commit
        return bool(known and found and found["finished"] and found["commit"] == commit)

    def merge(self, others: Sequence[Path]) -> None:
        """Take from other files of the same device every part that is newer, or is not here.

        Raises
        ------
        ValueError
            If a file holds something else.
        """
        with self._lock:
            for path in others:
                other = _read(path)
                mine = self.content.get("device", {}).get("name")
                theirs = other.get("device", {}).get("name")
                if mine is not None and theirs != mine:
                    raise ValueError(f"{path} must hold results of {mine}; got {theirs}")
                newest = False
                for name, part in other["parts"].items():
                    before = self.content["parts"].get(name)
                    if before is None or (part["finished"], part["date"]) >= (before["finished"], before["date"]):
                        self.content["parts"][name] = part
                        newest = True
                if newest:
                    self.content.update({key: value for key, value in other.items() if key != "parts"})
            self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(self.path, self.content)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("suite") != _SUITE:
        raise ValueError(f"{path} must hold results of benchmarks/gpu.py; got suite {content.get('suite')!r}")
    return content
