"""The GPU tests in one process; every outcome is saved at once, so a crash loses none."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.progress import Save, take_death
from tikmix_fast import files

__all__ = ["run_suite_of_tests"]

# These replace the project's own settings, which ask for plugins that a machine may lack.
_SETTINGS = """\
[pytest]
addopts = -ra --strict-markers --import-mode=importlib -p no:cacheprovider
xfail_strict = true
markers = slow: needs more than a few seconds; run by --full
"""
# After one of these errors, nothing runs any more in the process.
_DEVICE_LOST = (
    "illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address",
    "illegal instruction", "CUDA error: an illegal",
)  # fmt: skip
_LONGEST_REASON = 3000


class _Recorder:
    """A pytest plugin that leaves out tests with an outcome and saves after every test."""

    def __init__(self, content: dict[str, Any], end: float, save: Save) -> None:
        self._content, self._end, self._save = content, end, save
        self._run = {*content["passed"], *content["skipped"], *content["failed"]}
        self._session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self._content["collected"] = len(items)
        items[:] = [item for item in items if item.nodeid not in self._run]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._content["trying"] = {"case": "tests", "what": nodeid}
        self._save(self._content)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        content = self._content
        if report.failed:
            text = report.longreprtext
            content["failed"][report.nodeid] = text[-_LONGEST_REASON:]
            if self._session and any(each in text for each in _DEVICE_LOST):
                content["lost"] = report.nodeid
                self._session.shouldstop = "the device is lost to this process"
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            content["skipped"][report.nodeid] = reason
        elif report.when == "call":
            content["passed"].append(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._content.pop("trying", None)
        if self._session and time.monotonic() > self._end:
            self._content["stopped"] = "the time was up"
            self._session.shouldstop = "the time was up"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._content["failed"][report.nodeid] = report.longreprtext[-_LONGEST_REASON:]


def run_suite_of_tests(
    content: dict[str, Any],
    seconds: float,
    save: Save,
    *,
    root: Path,
    paths: list[str],
    environment: dict[str, str],
) -> bool:
    """Run the tests that have no outcome yet, and save after each.

    Parameters
    ----------
    content : dict
        What an earlier process saved, or an empty dict. Changed in place: ``collected``, ``passed`` (list), ``skipped``
        and ``failed`` (test to reason). A test that killed its process counts as failed.
    seconds : float
        Start no test after this time.
    save : callable (dict) -> object
    root : Path
        Root of the source tree.
    paths : list of str
        Files, relative to ``root``.
    environment : dict of str to str
        Environment variables of the tests.

    Returns
    -------
    bool
        Whether a device error ended the run; the rest then needs another process.
    """
    for name in ("skipped", "failed"):
        content.setdefault(name, {})
    content.setdefault("passed", [])
    lost = content.pop("lost", None)
    death = take_death(content)
    if death and lost is None:
        content["failed"][death["what"]] = f"the process died: {death['why']}"
    content.pop("stopped", None)
    missing = [each for each in paths if not (root / each).exists()]
    for each in missing:
        content["failed"][each] = "there is no such file"
    present = [str(root / each) for each in paths if each not in missing]
    if present:
        os.environ.update(environment)
        settings = Path("pytest-gpu.ini").resolve()
        files.write_text(settings, _SETTINGS)  # atomically: several processes may write it
        recorder = _Recorder(content, time.monotonic() + seconds, save)
        status = pytest.main(["-c", str(settings), f"--rootdir={root}", "--full", "-q", *present], plugins=[recorder])
        if status not in (
            pytest.ExitCode.OK,
            pytest.ExitCode.TESTS_FAILED,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ) and not (content["failed"] or "stopped" in content or "lost" in content):
            content["failed"]["pytest"] = f"ended with {status!r}"
    save(content)
    return "lost" in content
