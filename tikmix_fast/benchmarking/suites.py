"""The suites of ``tikmix-fast bench``, and how large they run."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from tikmix_fast.benchmarking import measurement, ops, training_step
from tikmix_fast.benchmarking.baselines import Method
from tikmix_fast.benchmarking.machine import measure_rates
from tikmix_fast.benchmarking.measurement import FLOOR, MeasurementMethod
from tikmix_fast.report.environment import describe_environment

__all__ = ["SUITES", "BenchSettings", "Size", "Suite", "Tell", "engine_suite", "ops_suite", "run_suite"]

Size = Literal["full", "quick", "tiny"]
Tell = Callable[[str], object]


@dataclass(frozen=True)
class BenchSettings:
    """How much to measure.

    Attributes
    ----------
    size : "full", "quick" or "tiny"
        The cases: those of the committed results; fewer, for a minute or two; or tiny ones, whose numbers mean nothing.
    rounds : int
        Most rounds of every comparison.
    seconds : float or None
        A comparison starts no further round after this time, once it has 3.
    weigh : bool
        Measure peak memory too, in a fresh process for every number.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    size: Size = "full"
    rounds: int = 20
    seconds: float | None = None
    weigh: bool = True

    def __post_init__(self) -> None:
        if self.size not in get_args(Size):
            raise ValueError(f"size must be one of {', '.join(get_args(Size))}; got {self.size!r}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1; got {self.rounds}")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds must be positive; got {self.seconds}")

    @classmethod
    def of(cls, size: Size) -> BenchSettings:
        """Return the usual settings of a size."""
        if size == "full":
            return cls()
        return cls(size, rounds=20 if size == "quick" else 3, seconds=4, weigh=False)


Suite = Callable[[BenchSettings, Tell], dict[str, Any]]


def ops_suite(
    settings: BenchSettings, tell: Tell, others: Callable[[ops.Case], Mapping[str, Method]] = lambda case: {}
) -> dict[str, Any]:
    """Measure the kernels against torch's ways, and against ``others`` of each case."""
    tell("the machine's own limits")
    rates = measure_rates(seconds={"full": 12.0, "quick": 2.0, "tiny": 0.3}[settings.size])
    cases = {"full": ops.CASES, "quick": ops.QUICK_CASES, "tiny": ops.TINY_CASES}[settings.size]
    results = [
        ops.measure_case(
            case,
            rates,
            rounds=settings.rounds,
            seconds=settings.seconds,
            weigh=settings.weigh,
            others=others(case),
            tell=tell,
        )
        for case in cases
    ]
    return {"rates": rates.to_dict(), "cases": results}


def engine_suite(
    settings: BenchSettings,
    tell: Tell,
    others: Mapping[str, MeasurementMethod] | None = None,
    missing: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Measure training steps with the engine, and whole measurements of the influence matrix.

    Parameters
    ----------
    settings : BenchSettings
    tell : callable (str) -> object
    others : mapping of str to MeasurementMethod, optional
        Further ways to measure the matrix; they run with the slow ones.
    missing : mapping of str to str, optional
        Ways that cannot run here, with the reason.
    """
    rounds, seconds = settings.rounds, settings.seconds
    steps = []
    for step in {
        "full": training_step.STEPS, "quick": training_step.QUICK_STEPS, "tiny": training_step.TINY_STEPS,
    }[settings.size]:  # fmt: skip
        tell(f"training step: {step.name}")
        steps.append(training_step.measure_step(step, rounds=rounds, seconds=seconds))
    case = {
        "full": measurement.MEASUREMENT, "quick": measurement.QUICK_MEASUREMENT, "tiny": measurement.TINY_MEASUREMENT,
    }[settings.size]  # fmt: skip
    tell(f"all influence: {case.name}")
    methods = measurement.measurement_methods()
    fast = {name: method for name, method in methods.items() if not method.slow}
    results = [measurement.measure_measurement(case, fast, rounds=rounds, seconds=seconds)]
    if settings.size != "quick":
        slow = {name: method for name, method in methods.items() if method.slow} | dict(others or {})
        tell(f"all influence by slower ways: {', '.join(slow)}")
        compared = {FLOOR: methods[FLOOR], **slow}
        results.append(measurement.measure_measurement(case, compared, rounds=min(rounds, 6), seconds=seconds))
        results[-1]["skipped"] = dict(missing or {})
    memory: dict[str, Any] = {}
    if settings.weigh:
        tell("memory of the measurement with 4 and with 64 domains")
        memory = measurement.weigh_measurement(case, (4, 64))
    return {"steps": steps, "measurements": results, "memory": memory}


SUITES: Mapping[str, Suite] = {"ops": ops_suite, "engine": engine_suite}
"""The suites of ``tikmix-fast bench``; ``benchmarks/suites`` of the repository adds others."""


def run_suite(
    name: str,
    settings: BenchSettings,
    tell: Tell = lambda step: None,
    suites: Mapping[str, Suite] = SUITES,
) -> dict[str, Any]:
    """Run one suite.

    Parameters
    ----------
    name : str
        A key of ``suites``.
    settings : BenchSettings
    tell : callable (str) -> object
        Called with the name of each step before it starts.
    suites : mapping of str to callable (BenchSettings, Tell) -> dict

    Returns
    -------
    dict
        Plain JSON types: ``suite``, ``date``, ``environment``, ``settings``, and the entries of the suite itself.

    Raises
    ------
    ValueError
        If there is no suite of this name.
    AssertionError
        If a method computed a wrong result; every method is checked before anything is timed.
    """
    if name not in suites:
        raise ValueError(f"suite must be one of {', '.join(suites)}; got {name!r}")
    return {
        "suite": name,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "environment": describe_environment(),
        "settings": asdict(settings),
        **suites[name](settings, tell),
    }
