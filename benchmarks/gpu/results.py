"""The file of results of one kind of GPU, part by part."""

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
"""The parts, in the order in which they run."""

_SUITE = "gpu"


class GpuResults:
    """Results that are on disk as soon as they exist.

    Every part has its own commit and date, because parts may come from several runs.

    Parameters
    ----------
    folder : Path
    device : str
        Name of the device; the file is named after it.
    """

    def __init__(self, folder: Path, device: str) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        self.path = folder / f"gpu-{slug}.json"
        self._lock = threading.Lock()
        self.content: dict[str, Any] = {"suite": _SUITE, "parts": {}}
        if self.path.exists():
            self.content = _read(self.path)

    def describe(self, **facts: Any) -> None:
        """Save what all parts of this run share: ``device``, ``environment``, ``build``."""
        with self._lock:
            self.content.update(facts)
            self._save()

    def begin(self, part: str, commit: str | None, date: str) -> None:
        """Start a part anew, without earlier results."""
        with self._lock:
            self.content["parts"][part] = {"commit": commit, "date": date, "finished": False, "jobs": {}}
            self._save()

    def put(self, part: str, job: str, content: dict[str, Any]) -> None:
        """Save the results of one job so far; passed and skipped tests are only counted."""
        summary = dict(content)
        if "passed" in content:
            summary["passed"] = len(content["passed"])
            summary["skipped"] = dict(Counter(content["skipped"].values()))
        with self._lock:
            self.content["parts"][part]["jobs"][job] = summary
            self._save()

    def finish(self, part: str, seconds: float, finished: bool) -> None:
        """Record how long a part took, and whether it got to its end."""
        with self._lock:
            self.content["parts"][part].update(finished=finished, seconds=seconds)
            self._save()

    def has(self, part: str, commit: str | None) -> bool:
        """Return whether a part is finished at this commit; False if the commit is unknown or has changes."""
        before = self.content["parts"].get(part)
        known = commit is not None and "with changes" not in commit
        return bool(known and before and before["finished"] and before["commit"] == commit)

    def merge(self, others: Sequence[Path]) -> None:
        """Take every part that is newer, or missing here, from other files of the same device.

        Raises
        ------
        ValueError
            If a file holds results of something else.
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
        raise ValueError(f"{path} must hold results of python -m benchmarks.gpu; got suite {content.get('suite')!r}")
    return content
