"""Jobs in processes of their own: started, watched, and started again after a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.build import interpreter_for
from benchmarks.gpu.worker import AGAIN
from tikmix_fast import files

__all__ = ["MOST_STARTS", "Runner", "read_content", "run_job"]

MOST_STARTS = 6
"""A job may take this many processes."""


def run_job(
    start: Callable[[], subprocess.Popen[bytes]],
    content_path: Path,
    end: float,
    patience: float | None,
    publish: Callable[[dict[str, Any]], object],
    last_words: Callable[[], str] = lambda: "",
) -> bool:
    """Run one job to its end, in as many processes as it takes; return whether it got there.

    Parameters
    ----------
    start : callable () -> Popen
        Starts a worker in a session of its own.
    content_path : Path
        The file of the worker's results.
    end : float
        Deadline on the monotonic clock.
    patience : float or None
        A process without news for this many seconds counts as stuck.
    publish : callable (dict) -> object
        Called with the worker's results whenever they change.
    last_words : callable () -> str
        Returns the end of the worker's output.
    """
    for _ in range(MOST_STARTS):
        process = start()
        late, stuck = _watch(process, content_path, end, patience, publish)
        content = read_content(content_path)
        if process.returncode == 0:
            publish(content)
            return True
        if late:
            content["stopped"] = "the time was up"
        elif process.returncode != AGAIN:
            why = f"no news for {patience:.0f} s" if stuck else f"ended with status {process.returncode} {last_words()}"
            if "trying" in content:
                content["trying"].setdefault("why", why.strip())
            else:
                content.setdefault("failure", why.strip())
        files.write_json(content_path, content)
        publish(content)
        if late or "failure" in content:
            return False
    return False


def _watch(
    process: subprocess.Popen[bytes], content_path: Path, end: float, patience: float | None,
    publish: Callable[[dict[str, Any]], object],
) -> tuple[bool, bool]:  # fmt: skip
    """Publish news until the process ends; kill it if it is late or stuck, and return both."""
    news, late, stuck = time.monotonic(), False, False
    latest = None
    while process.poll() is None:
        time.sleep(0.2)
        now = time.monotonic()
        changed = content_path.stat().st_mtime_ns if content_path.exists() else None
        if changed != latest:
            latest, news = changed, now
            publish(read_content(content_path))
        late, stuck = now > end, patience is not None and now - news > patience
        if late or stuck:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return late, stuck


def read_content(path: Path) -> dict[str, Any]:
    """Return the results in a file, or an empty dict if there is no file."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


class Runner:
    """Starts workers on the staged package.

    Parameters
    ----------
    root : Path
        The repository.
    folder : Path
        The folder in which workers run and keep their results.
    site : Path or None
        The staged package; None to use the installed one.
    rehearse : bool
        Whether workers rehearse on the CPU.
    """

    def __init__(self, root: Path, folder: Path, site: Path | None, rehearse: bool) -> None:
        self.root, self.folder, self.rehearse = root, folder, rehearse
        folder.mkdir(parents=True, exist_ok=True)
        if site is None:
            path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
            self.interpreter, self.environment = [sys.executable], {"PYTHONPATH": path}
        else:
            self.interpreter, self.environment = interpreter_for(site, root)
        self.environment |= {
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def run(
        self, job: str, seconds: float, publish: Callable[[dict[str, Any]], object],
        environment: dict[str, str] | None = None, patience: float | None = None,
    ) -> bool:  # fmt: skip
        """Run one job from its beginning, as `run_job` does."""
        name = "".join(each if each.isalnum() else "-" for each in job)
        content_path = self.folder / f"{name}.json"
        content_path.unlink(missing_ok=True)
        log_path = self.folder / f"{name}.log"
        log_path.unlink(missing_ok=True)
        end = time.monotonic() + seconds

        def start() -> subprocess.Popen[bytes]:
            left = max(end - time.monotonic(), 1.0)
            command = [
                *self.interpreter, "-m", "benchmarks.gpu.worker", job, "--content", str(content_path),
                "--root", str(self.root), "--seconds", str(0.9 * left),
            ]  # fmt: skip
            with log_path.open("ab") as log:
                return subprocess.Popen(
                    [*command, *(["--rehearse"] if self.rehearse else [])],
                    cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    env=os.environ | self.environment | (environment or {}),
                )  # fmt: skip

        return run_job(
            start, content_path, end, patience, publish, lambda: log_path.read_text(errors="replace")[-500:]
        )  # fmt: skip
