"""The suites, and how large they are run."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from benchmarks.suites import choice, mixture, sampler
from benchmarks.suites.neighbours import find_neighbours
from tikmix_fast.benchmarking import engine, ops
from tikmix_fast.benchmarking.engine import FLOOR
from tikmix_fast.benchmarking.machine import measure_rates
from tikmix_fast.report.environment import describe_environment

__all__ = ["SUITES", "BenchSettings", "Size", "run_suite"]

SUITES = ("ops", "choice", "engine", "mixture", "sampler")
"""The kernels; what they choose by counting; steps and measurements with the engine; TiKMiX-D; the sampler."""

Size = Literal["full", "quick", "tiny"]
Tell = Callable[[str], object]


@dataclass(frozen=True)
class BenchSettings:
    """How much to measure.

    Attributes
    ----------
    size : "full", "quick" or "tiny"
        The cases: those of the committed results; fewer, for a minute or two; or so small that they say nothing.
    rounds : int
        Most rounds of every comparison.
    seconds : float or None
        Of every comparison, after at least 3 rounds.
    weigh : bool
        Measure peak memory, in a fresh process for every number.
    every_instruction_set : bool
        Time our kernel also with each instruction set forced, in the cases of less than 10 GFLOP.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    size: Size = "full"
    rounds: int = 20
    seconds: float | None = None
    weigh: bool = True
    every_instruction_set: bool = True

    def __post_init__(self) -> None:
        if self.size not in get_args(Size):
            raise ValueError(f"size must be one of {', '.join(get_args(Size))}; got {self.size!r}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1; got {self.rounds}")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds must be positive; got {self.seconds}")

    @classmethod
    def of(cls, size: Size) -> BenchSettings:
        """Return the settings that a size is usually run with."""
        if size == "full":
            return cls()
        return cls(size, rounds=20 if size == "quick" else 3, seconds=4, weigh=False, every_instruction_set=False)


def run_suite(
    name: str,
    settings: BenchSettings,
    tell: Tell = lambda what: None,
) -> dict[str, Any]:
    """Run one suite.

    Parameters
    ----------
    name : str
        One of `SUITES`.
    settings : BenchSettings
    tell : callable (str) -> object
        Called with what is being done.

    Returns
    -------
    dict
        Plain JSON types: ``suite``, ``date``, ``environment``, ``settings``, ``cases``, and what the suite adds.

    Raises
    ------
    ValueError
        If there is no suite of this name.
    AssertionError
        If something computed a wrong result; nothing is timed before it was found right.
    """
    content = {
        "suite": name,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "environment": describe_environment(),
        "settings": asdict(settings),
    }
    match name:
        case "ops":
            return {**content, **_ops(settings, tell)}
        case "choice":
            return {**content, **_choice(settings, tell)}
        case "engine":
            return {**content, **_engine(settings, tell)}
        case "mixture":
            return {**content, **_mixture(settings, tell)}
        case "sampler":
            return {**content, **_sampler(settings, tell)}
        case _:
            raise ValueError(f"suite must be one of {', '.join(SUITES)}; got {name!r}")


def _ops(settings: BenchSettings, tell: Tell) -> dict[str, Any]:
    tell("the machine's own limits")
    rates = measure_rates(seconds={"full": 12.0, "quick": 2.0, "tiny": 0.3}[settings.size])
    cases = {"full": ops.CASES, "quick": ops.QUICK_CASES, "tiny": ops.TINY_CASES}[settings.size]
    found = [
        ops.measure_case(
            case,
            rates,
            rounds=settings.rounds,
            seconds=settings.seconds,
            weigh=settings.weigh,
            # Without vector instructions, larger cases take seconds per call.
            every_instruction_set=settings.every_instruction_set and case.plain_flops < 1e10,
            tell=tell,
        )
        for case in cases
    ]
    return {"rates": rates.to_dict(), "cases": found}


def _choice(settings: BenchSettings, tell: Tell) -> dict[str, Any]:
    grid = {"full": choice.GRID, "quick": choice.QUICK_GRID, "tiny": choice.TINY_GRID}[settings.size]
    cases = []
    for dtype in ("float32", "bfloat16"):
        tell(f"three ways to group influence in {dtype}")
        cases += [choice.measure_choice(case, dtype, rounds=min(settings.rounds, 5)) for case in grid]
    return {"cases": cases}


def _engine(settings: BenchSettings, tell: Tell) -> dict[str, Any]:
    rounds, seconds = settings.rounds, settings.seconds
    steps = []
    for case in {"full": engine.STEPS, "quick": engine.QUICK_STEPS, "tiny": engine.TINY_STEPS}[settings.size]:
        tell(f"training step: {case.name}")
        steps.append(engine.measure_step(case, rounds=rounds, seconds=seconds))
    measurement = {
        "full": engine.MEASUREMENT, "quick": engine.QUICK_MEASUREMENT, "tiny": engine.TINY_MEASUREMENT,
    }[settings.size]  # fmt: skip
    tell(f"all influence: {measurement.name}")
    methods = engine.measurement_methods()
    fast = {name: method for name, method in methods.items() if not method.slow}
    measured = [engine.measure_measurement(measurement, fast, rounds=rounds, seconds=seconds)]
    if settings.size != "quick":
        neighbours, missing = find_neighbours()
        slow = {FLOOR: methods[FLOOR], **{n: each for n, each in methods.items() if each.slow}, **neighbours}
        tell(f"all influence by slower ways: {', '.join(list(slow)[1:])}")
        measured.append(engine.measure_measurement(measurement, slow, rounds=min(rounds, 6), seconds=seconds))
        measured[-1]["skipped"] = missing
    memory: dict[str, Any] = {}
    if settings.weigh:
        tell("memory of the measurement with 4 and with 64 domains")
        memory = engine.weigh_measurement(measurement, (4, 64))
    return {"steps": steps, "measurements": measured, "memory": memory}


def _mixture(settings: BenchSettings, tell: Tell) -> dict[str, Any]:
    shapes = mixture.TINY_SHAPES if settings.size == "tiny" else mixture.SHAPES
    cases = []
    for domains, tasks in shapes:
        tell(f"TiKMiX-D with {domains} domains and {tasks} tasks")
        cases.append(mixture.measure_mixture(domains, tasks, rounds=settings.rounds, seconds=settings.seconds))
    return {"cases": cases}


def _sampler(settings: BenchSettings, tell: Tell) -> dict[str, Any]:
    tell("draws of 64 domains")
    draws = {"full": 10**6, "quick": 2 * 10**5, "tiny": 10**4}[settings.size]
    rounds = min(settings.rounds, 10)
    return {"cases": [sampler.measure_sampler(draws=draws, rounds=rounds, seconds=settings.seconds)]}
