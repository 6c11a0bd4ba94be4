"""The settings that the suites share."""

from __future__ import annotations

import pytest

from tikmix_fast.benchmarking.suites import BenchSettings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tiny", action="store_true", help="sizes that only show that everything runs")


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> BenchSettings:
    """The settings of `run_suite` for this run."""
    return BenchSettings.of("tiny" if request.config.getoption("--tiny") else "full")
