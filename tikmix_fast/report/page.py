"""One HTML file that shows results: no script, nothing from the network, every name escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from tikmix_fast._version import __version__
from tikmix_fast.demo.results import DemoResult
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.mixture.schedule.decision import Decision
from tikmix_fast.mixture.schedule.dynamic import DynamicMixture
from tikmix_fast.report.findings import list_names, matrix_warnings, relative_influence
from tikmix_fast.report.page_charts import loss_chart, mixture_chart, sparkline
from tikmix_fast.report.result_files import Sources

__all__ = ["make_page"]

_WITH_ERRORS = 200
"""The most cells of a heat map that also shows errors; the table of all numbers always has them."""

_FOLDER = FileSystemLoader(Path(__file__).parent)
_ENVIRONMENT = Environment(loader=_FOLDER, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
_HTML: Any = _ENVIRONMENT.get_template("page.html.j2").module
"""The template's macros as functions that return `Markup`."""

_Parts = Iterator[Markup]


def make_page(sources: Sources, title: str = "Data influence and mixture") -> str:
    """Return the whole page under this title."""
    parts: list[tuple[str, _Parts]] = [
        *((f"Measurement {name}", _run(each)) for name, each in sources.runs),
        *((f"Influence {name}", _matrix(each)) for name, each in sources.matrices),
        *((f"Mixture {name}", _mixture(each)) for name, each in sources.mixtures),
        *((f"Schedule {name}", _schedule(each)) for name, each in sources.schedules),
        *((f"Training run {name}", _demo(each)) for name, each in sources.demos),
    ]
    return str(_HTML.page(title, [(name, Markup("\n").join(each)) for name, each in parts], __version__))


def _matrix(matrix: InfluenceMatrix, level: int = 3) -> _Parts:
    significant = matrix.significant(correction="bh")
    n, m = matrix.shape
    yield _HTML.beware(level, matrix_warnings(matrix))
    yield _HTML.heading(level, "In short")
    yield _HTML.text(
        f"{_count(m, 'domain')}, {_count(n, 'task')}; {int(significant.sum())} of {n * m} influences differ from "
        "zero (95 % confidence over all cells together, Benjamini-Hochberg)."
    )
    rows = []
    for i, task in enumerate(matrix.tasks):
        order = np.argsort(-np.nan_to_num(matrix.values[i]), kind="stable")
        helps = [matrix.domains[j] for j in order if significant[i, j] and matrix.values[i, j] > 0]
        harms = [matrix.domains[j] for j in order[::-1] if significant[i, j] and matrix.values[i, j] < 0]
        rows.append([task, *(list_names(names, 3) or "none surely" for names in (helps, harms))])
    yield _HTML.table("Which domains surely help or harm a task, strongest first", ["Task", "Help", "Harm"], rows)
    yield _HTML.heading(level, "Heat map")
    yield _heat_map(matrix, significant)
    yield _numbers(matrix)


def _heat_map(matrix: InfluenceMatrix, significant: NDArray[np.bool_]) -> Markup:
    with_errors = matrix.values.size <= _WITH_ERRORS
    values, errors = relative_influence(matrix)

    def cell(i: int, j: int) -> Markup:
        value, sure = values[i, j], bool(significant[i, j])
        if np.isnan(value):
            return Markup(_HTML.missing("not measured"))
        error = f"±{errors[i, j]:.2f}" if with_errors and np.isfinite(errors[i, j]) else ""
        side, strength = "helps" if value > 0 else "harms", round(abs(value) * (60 if sure else 30))
        return Markup(_HTML.heat(f"{value:+.2f}", sure, side, strength, error))

    # Domains in order of their influence on all tasks together, unmeasured ones last.
    order = np.argsort(-np.where(np.isnan(values), -np.inf, values).sum(axis=0), kind="stable")
    rows = [[matrix.domains[j], *(cell(i, j) for i in range(len(matrix.tasks)))] for j in order]
    caption = (
        "Influence of each domain (row) on each task (column), as a share of the largest in the column. "
        "+ helps (blue), - harms (orange). ★ differs from zero; (in brackets) it may be zero. "
        + ("± standard error. " if with_errors else "")
        + "Rows in order of their sum."
    )
    return Markup(_HTML.table(caption, ["Domain", *matrix.tasks], rows, "heat"))


def _numbers(matrix: InfluenceMatrix) -> Markup:
    rows = []
    for j, domain in enumerate(matrix.domains):
        cells = (
            f"{_number(value, 3)} ± {_number(error, 2)}"
            for value, error in zip(matrix.values[:, j], matrix.stderr[:, j], strict=True)
        )
        rows.append([domain, _number(matrix.tokens[j]), str(matrix.microbatches[j]), *cells])
    caption = "Loss of a task per unit step along a domain's preconditioned mean gradient, ± standard error"
    table = _HTML.table(caption, ["Domain", "Tokens", "Micro-batches", *matrix.tasks], rows, "numbers")
    return _details("All numbers", {"How it was measured": matrix.settings}, table)


def _mixture(mixture: Mapping[str, Any]) -> _Parts:
    yield _HTML.beware(3, [*mixture["warnings"], *([] if mixture.get("success") else ["No mixture was found."])])
    effective, message = mixture.get("effective_domains"), mixture["message"]
    evenness = f" It is as even as {effective:.1f} equal domains would be." if effective else ""
    yield _HTML.text(f"{message[:1].upper()}{message[1:]}.{evenness}")
    before = dict(zip(mixture["domains"], mixture["prior"], strict=True))
    yield _weights([(0, before), (1, mixture["weights"])], "Weights before and after")
    columns = (mixture.get(name) or [] for name in ("tasks", "predicted_prior", "predicted"))
    rows = [[task, _number(old, 3), _number(new, 3)] for task, old, new in zip(*columns, strict=True)]
    if rows:
        caption = "Predicted influence of the mixture on each task; more lowers its loss more"
        yield _HTML.table(caption, ["Task", "Before", "After"], rows, "numbers")
    yield _details("Settings", {"Settings of the solver": mixture.get("settings") or {}})


def _schedule(schedule: DynamicMixture) -> _Parts:
    history = schedule.history
    warnings = []
    for each in history:
        failure = [] if each.success else [f"no mixture was found: {each.message}"]
        warnings += [f"At step {each.step}: {warning}" for warning in (*failure, *each.warnings)]
    yield _HTML.beware(3, warnings)
    changed = sum(each.changed for each in history)
    yield _HTML.text(
        f"{_count(schedule.steps, 'step')}, {_count(len(schedule.boundaries), 'boundary', 'boundaries')}; influence "
        f"was measured at {len(history)} of them so far, and the mixture changed at {changed}."
    )
    mixtures = {0: schedule.state_dict()["warm_up"]} | {each.step: each.weights for each in history}
    yield from _over_time(list(mixtures.items()), schedule.steps)
    if history:
        rows = [[f"step {each.step}", f"{each.reason}."] for each in history]
        yield _HTML.table("What was decided", ["At", "Decision"], rows)
    yield from _ranks(history)


def _ranks(history: Sequence[Decision]) -> _Parts:
    """Show whether the order of the domains stayed, at the steps with an earlier order to compare with."""
    ranked = [(each.step, each.ranks) for each in history if each.ranks is not None]
    if not ranked:
        return
    tasks = list(dict.fromkeys(task for _, ranks in ranked for task in ranks.tasks))
    rows: list[list[str | Markup]] = [[task] for task in [*tasks, "mean"]]
    for _, ranks in ranked:
        numbers = dict(zip(ranks.tasks, zip(ranks.spearman, ranks.kendall, ranks.ceiling, strict=True), strict=True))
        for row, task in zip(rows, tasks, strict=False):
            row.append(_agreement(*numbers[task]) if task in numbers else _HTML.missing("not compared"))
        rows[-1].append(_agreement(ranks.mean_spearman, ranks.mean_kendall, ranks.mean_ceiling))
    caption = (
        "Agreement with the order of the domains that was measured before: Spearman's correlation (Kendall's). 1 is "
        "the same order; at most: what noise in both measurements would leave of it."
    )
    yield _HTML.heading(3, "Did the ranks stay?")
    yield _HTML.table(caption, ["Task", *(f"step {step}" for step, _ in ranked)], rows, "numbers")
    if len(ranked) > 1:
        measured = [(step, ranks.mean_spearman) for step, ranks in ranked if np.isfinite(ranks.mean_spearman)]
        most = [(step, ranks.mean_ceiling) for step, ranks in ranked if np.isfinite(ranks.mean_ceiling)]
        name = "Mean agreement of the ranks over steps; the numbers are in the table"
        note = "Mean over tasks, over steps: the solid line as measured, the dashed one at most."
        yield _HTML.charts(note, [("", loss_chart({"measured": measured, "at most": most}, name))])


def _agreement(spearman: float, kendall: float, ceiling: float) -> Markup:
    if np.isnan(spearman):
        return Markup(_HTML.missing("unknown"))
    most = f"at most {ceiling:.2f}" if np.isfinite(ceiling) else ""
    return Markup(_HTML.cell(f"{spearman:.2f} ({kendall:.2f})", most))


def _run(run: Mapping[str, Any]) -> _Parts:
    yield _HTML.beware(3, run["warnings"])
    yield from _costs(run["seconds"], {"memory": run.get("memory", "")})
    tables = {"Settings": run["settings"], "Environment": run.get("environment") or {}}
    yield _details("Settings and environment", tables)


def _demo(demo: DemoResult) -> _Parts:
    warnings = [f"At step {b.step} no mixture was found: {b.message}" for b in demo.boundaries if not b.success]
    warnings += [f"Missing here: {name}: {why}" for name, why in demo.missing.items()]
    yield _HTML.beware(3, warnings)
    words = "Mean loss of the tasks that were steered for: {} than with a uniform mixture; of the tasks held out: {}."
    changes = [demo.change(tasks) if tasks else None for tasks in (demo.steered, demo.held_out)]
    yield _HTML.text(
        Markup(words).format(*("none" if each is None else _HTML.change(abs(each), each < 0) for each in changes))
    )
    yield _HTML.heading(3, "Losses")
    yield from _losses(demo)
    yield from _over_time(demo.tikmix.weights, demo.settings.steps)
    if demo.boundaries:
        last = demo.boundaries[-1]
        yield _HTML.heading(3, f"Influence at step {last.step}")
        yield from _matrix(last.matrix, 4)
    yield from _costs(demo.seconds, {f"sequences {what}": count for what, count in demo.rows.items()})
    tables = {"Settings": demo.settings.to_dict(), "Sources of the text": demo.sources, "Environment": demo.environment}
    yield _details("Settings and environment", tables)


def _losses(demo: DemoResult) -> _Parts:
    rows, charts = [], []
    for group, tasks in (("steered for", demo.steered), ("held out", demo.held_out)):
        for task in tasks:
            theirs, ours = demo.uniform.final[task], demo.tikmix.final[task]
            word = "better" if ours < theirs else "worse" if ours > theirs else "same"
            rows.append([task, group, f"{theirs:.3f}", f"{ours:.3f}", f"{100 * (ours / theirs - 1):+.1f} %, {word}"])
            lines = {
                name: [(step, losses[task]) for step, losses in arm.losses]
                for name, arm in (("TiKMiX-D", demo.tikmix), ("uniform", demo.uniform))
            }
            name = f"Loss of {task} over steps with both mixtures; final values are in the table"
            charts.append((task, loss_chart(lines, name)))
    caption = "Loss after training, nats per byte, on text that was neither trained on nor measured"
    yield _HTML.table(caption, ["Task", "Group", "Uniform", "TiKMiX-D", "Change"], rows, "numbers")
    yield _HTML.charts("Curves: TiKMiX-D is the solid line, uniform the dashed one; nats per byte over steps.", charts)


def _over_time(weights: Sequence[tuple[int, Mapping[str, float]]], steps: int) -> _Parts:
    yield _HTML.heading(3, "Mixture over time")
    chart = mixture_chart(weights, steps, "Weights of the domains over steps, stacked")
    yield _HTML.picture(chart, "The table below has the same numbers.")
    yield _weights(weights, "Weights over time", step="step ")


def _weights(weights: Sequence[tuple[int, Mapping[str, float]]], caption: str, step: str = "") -> Markup:
    (start, first), (end, last) = weights[0], weights[-1]
    highest = max(max(mixture.values()) for _, mixture in weights)
    rows = []
    for domain in sorted(last, key=lambda each: -last[each]):
        curve = _HTML.cell(sparkline([mixture[domain] for _, mixture in weights], highest))
        change = f"{100 * (last[domain] - first[domain]):+.1f} points"
        rows.append([domain, f"{first[domain]:.1%}", curve, f"{last[domain]:.1%}", change])
    heads = [f"{step}{start}", "Course", f"{step}{end}"] if step else ["Before", "Course", "After"]
    return Markup(_HTML.table(caption, ["Domain", *heads, "Change"], rows, "numbers"))


def _costs(seconds: Mapping[str, float], more: Mapping[str, Any]) -> _Parts:
    rows = [[what, f"{float(duration):.1f} s"] for what, duration in seconds.items()]
    rows += [[what, str(value)] for what, value in more.items()]
    yield _HTML.heading(3, "Costs")
    yield _HTML.table("Wall time by kind of work, and what else it took", ["What", "Cost"], rows)


def _details(summary: str, settings: Mapping[str, Mapping[str, Any]], before: Markup | str = "") -> Markup:
    """Fold away ``before`` and one table per entry of ``settings``, which maps captions to names and values."""
    tables = (_HTML.table(caption, ["Name", "Value"], list(_flat(each))) for caption, each in settings.items())
    return Markup(_HTML.details(summary, Markup("").join([before, *tables])))


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name} / ")
        elif isinstance(value, list):
            yield f"{before}{name}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{before}{name}", "none" if value is None else str(value)


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def _number(value: Any, digits: int = 6) -> str:
    if value is None or not np.isfinite(float(value)):
        return "unknown"
    return f"{float(value):.{digits}g}"
