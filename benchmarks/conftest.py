"""What the suites have in common: how large they run."""

from __future__ import annotations

import pytest

from tikmix_fast.benchmarking.suites import BenchSettings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tiny", action="store_true", help="sizes that show that everything runs, and no more")


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> BenchSettings:
    """The settings of `run_suite` for this run."""
    return BenchSettings.of("tiny" if request.config.getoption("--tiny") else "full")
