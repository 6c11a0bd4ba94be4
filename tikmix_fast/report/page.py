"""One HTML file that shows what was measured: no script, nothing from the network, every name escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tikmix_fast._version import __version__
from tikmix_fast.demo.results import DemoResult
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.mixture.schedule.decision import Decision
from tikmix_fast.mixture.schedule.dynamic import DynamicMixture
from tikmix_fast.report.charts import loss_chart, mixture_chart, sparkline
from tikmix_fast.report.findings import list_names, matrix_warnings
from tikmix_fast.report.page_style import STYLE
from tikmix_fast.report.sources import Sources

__all__ = ["make_page"]

_WITH_ERRORS = 200
"""Most cells of a heat map in which the errors are shown too; the table of all numbers has them anyway."""


def make_page(sources: Sources, title: str = "Data influence and mixture") -> str:
    """Return the whole page.

    Parameters
    ----------
    sources : Sources
    title : str
    """
    sections: list[str] = []
    for name, run in sources.runs:
        sections.append(_section(f"Measurement {name}", _run(run)))
    for name, matrix in sources.matrices:
        sections.append(_section(f"Influence {name}", _matrix(matrix)))
    for name, mixture in sources.mixtures:
        sections.append(_section(f"Mixture {name}", _mixture(mixture)))
    for name, schedule in sources.schedules:
        sections.append(_section(f"Schedule {name}", _schedule(schedule)))
    for name, demo in sources.demos:
        sections.append(_section(f"Training run {name}", _demo(demo)))
    text = escape(title)
    # The policy lets the page load nothing at all, whatever a name in it may hold.
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<header><h1>{text}</h1></header>\n<main>\n"
        + "\n".join(sections)
        + f"\n</main>\n<footer><p>Made by tikmix_fast {escape(__version__)}.</p></footer>\n</body>\n</html>\n"
    )


def _section(title: str, parts: Iterator[str]) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _matrix(matrix: InfluenceMatrix, level: int = 3) -> Iterator[str]:
    significant = matrix.significant(correction="bh")
    n, m = matrix.shape
    yield _warnings(matrix_warnings(matrix), level)
    yield _heading(level, "In short")
    yield (
        f"<p>{_count(m, 'domain')}, {_count(n, 'task')}; {int(significant.sum())} of {n * m} influences differ from "
        "zero (95 % confidence over all cells together, Benjamini-Hochberg).</p>"
    )
    rows = []
    for i, task in enumerate(matrix.tasks):
        order = np.argsort(-np.nan_to_num(matrix.values[i]), kind="stable")
        helps = [matrix.domains[j] for j in order if significant[i, j] and matrix.values[i, j] > 0]
        harms = [matrix.domains[j] for j in order[::-1] if significant[i, j] and matrix.values[i, j] < 0]
        rows.append([_head(task), *(_cell(list_names(names, 3) or "none surely") for names in (helps, harms))])
    yield _table("Which domains surely help or harm a task, strongest first", ["Task", "Help", "Harm"], rows)
    yield _heading(level, "Heat map")
    yield _heat_map(matrix, significant)
    yield _numbers(matrix)


def _heat_map(matrix: InfluenceMatrix, significant: NDArray[np.bool_]) -> str:
    with_errors = matrix.values.size <= _WITH_ERRORS
    scale = np.nan_to_num(np.abs(matrix.values)).max(axis=1, keepdims=True)
    scale[~(scale > 0)] = 1.0
    values, errors = matrix.values / scale, matrix.stderr / scale
    # Unmeasured domains last; others by what they do for all tasks together.
    order = np.argsort(-np.where(np.isnan(values), -np.inf, values).sum(axis=0), kind="stable")
    rows = []
    for j in order:
        cells = [_head(matrix.domains[j])]
        for i in range(len(matrix.tasks)):
            value, error = values[i, j], errors[i, j]
            if np.isnan(value):
                cells.append('<td class="none">not measured</td>')
                continue
            sure = bool(significant[i, j])
            number = f"{value:+.2f}"
            shown = f'<b>{number}<span aria-hidden="true">★</span></b>' if sure else f"({number})"
            hidden = '<span class="hidden"> surely not zero</span>' if sure else ""
            spread = f"<small>±{error:.2f}</small>" if with_errors and np.isfinite(error) else ""
            strength = round(abs(value) * (60 if sure else 30))
            side = "helps" if value > 0 else "harms"
            cells.append(f'<td class="{side}" style="--strength:{strength}%">{shown}{hidden}{spread}</td>')
        rows.append(cells)
    caption = (
        "Influence of each domain (row) on each task (column), as a share of the largest in the column. "
        "+ helps (blue), - harms (orange). ★ differs from zero; (in brackets) it may be zero. "
        + ("± standard error. " if with_errors else "")
        + "Rows in order of their sum."
    )
    return _table(caption, ["Domain", *matrix.tasks], rows, kind="heat")


def _numbers(matrix: InfluenceMatrix) -> str:
    rows = []
    for j, domain in enumerate(matrix.domains):
        cells = [_head(domain), _cell(_number(matrix.tokens[j])), _cell(str(matrix.microbatches[j]))]
        for i in range(len(matrix.tasks)):
            cells.append(_cell(f"{_number(matrix.values[i, j], 3)} ± {_number(matrix.stderr[i, j], 2)}"))
        rows.append(cells)
    caption = "Loss of a task per unit step along a domain's preconditioned mean gradient, ± standard error"
    table = _table(caption, ["Domain", "Tokens", "Micro-batches", *matrix.tasks], rows, kind="numbers")
    settings = _settings("How it was measured", dict(matrix.settings))
    return _details("All numbers", table + settings)


def _mixture(mixture: Mapping[str, Any]) -> Iterator[str]:
    yield _warnings([*mixture["warnings"], *([] if mixture.get("success") else ["No mixture was found."])], 3)
    effective, message = mixture.get("effective_domains"), mixture["message"]
    yield (
        f"<p>{escape(message[:1].upper() + message[1:])}."
        + (f" It is as even as {effective:.1f} equal domains would be.</p>" if effective else "</p>")
    )
    before = dict(zip(mixture["domains"], mixture["prior"], strict=True))
    yield _weights([(0, before), (1, mixture["weights"])], "Weights before and after")
    gains = zip(
        *(mixture.get(name) or [] for name in ("tasks", "predicted_prior", "predicted")),
        strict=True,
    )
    rows = [[_head(task), _cell(_number(old, 3)), _cell(_number(new, 3))] for task, old, new in gains]
    if rows:
        caption = "Predicted influence of the mixture on each task; more lowers its loss more"
        yield _table(caption, ["Task", "Before", "After"], rows, kind="numbers")
    yield _details("Settings", _settings("Settings of the solver", mixture.get("settings") or {}))


def _schedule(schedule: DynamicMixture) -> Iterator[str]:
    history = schedule.history
    said = [
        f"At step {each.step}: {warning}"
        for each in history
        for warning in (*([] if each.success else [f"no mixture was found: {each.message}"]), *each.warnings)
    ]
    yield _warnings(said, 3)
    changed = sum(each.changed for each in history)
    yield (
        f"<p>{_count(schedule.steps, 'step')}, {_count(len(schedule.boundaries), 'boundary', 'boundaries')}; influence "
        f"was measured at {len(history)} of them so far, and the mixture changed at {changed}.</p>"
    )
    mixtures = {0: schedule.state_dict()["warm_up"]} | {each.step: each.weights for each in history}
    yield _over_time(list(mixtures.items()), schedule.steps)
    if history:
        rows = [[_head(f"step {each.step}"), _cell(f"{each.reason}.")] for each in history]
        yield _table("What was decided", ["At", "Decision"], rows)
    yield _ranks(history)


def _ranks(history: Sequence[Decision]) -> str:
    """Show whether the order of the domains stayed, where there was one before to compare with."""
    found = [(each.step, each.ranks) for each in history if each.ranks is not None]
    if not found:
        return ""
    tasks = list(dict.fromkeys(task for _, ranks in found for task in ranks.tasks))
    rows = [[_head(task)] for task in tasks] + [[_head("mean")]]
    for _, ranks in found:
        numbers = dict(zip(ranks.tasks, zip(ranks.spearman, ranks.kendall, ranks.ceiling, strict=True), strict=True))
        for row, task in zip(rows, tasks, strict=False):
            row.append(_agreement(*numbers[task]) if task in numbers else '<td class="none">not compared</td>')
        rows[-1].append(_agreement(ranks.mean_spearman, ranks.mean_kendall, ranks.mean_ceiling))
    means = {
        "measured": [(step, ranks.mean_spearman) for step, ranks in found],
        "at most": [(step, ranks.mean_ceiling) for step, ranks in found],
    }
    lines = {name: [point for point in line if np.isfinite(point[1])] for name, line in means.items()}
    name = "Mean agreement of the ranks over steps; the numbers are in the table"
    picture = loss_chart(lines, name) if len(found) > 1 else ""
    caption = (
        "Agreement with the order of the domains that was measured before: Spearman's correlation (Kendall's). 1 is "
        "the same order; at most: what noise in both measurements would leave of it."
    )
    note = "<p>Mean over tasks, over steps: the solid line as measured, the dashed one at most.</p>"
    return (
        _heading(3, "Did the ranks stay?")
        + _table(caption, ["Task", *(f"step {step}" for step, _ in found)], rows, kind="numbers")
        + (f'{note}<div class="charts"><figure>{picture}</figure></div>' if picture else "")
    )


def _agreement(spearman: float, kendall: float, ceiling: float) -> str:
    if np.isnan(spearman):
        return '<td class="none">unknown</td>'
    most = f"<small>at most {ceiling:.2f}</small>" if np.isfinite(ceiling) else ""
    return f"<td>{spearman:.2f} ({kendall:.2f}){most}</td>"


def _run(run: Mapping[str, Any]) -> Iterator[str]:
    yield _warnings(run["warnings"], 3)
    yield _costs(run["seconds"], {"memory": run.get("memory", "")})
    yield _details(
        "Settings and environment",
        _settings("Settings", run["settings"]) + _settings("Environment", run.get("environment") or {}),
    )


def _demo(demo: DemoResult) -> Iterator[str]:
    failed = [
        f"At step {each.step} no mixture was found: {each.message}" for each in demo.boundaries if not each.success
    ]
    missing = [f"Missing here: {name}: {why}" for name, why in demo.missing.items()]
    yield _warnings([*failed, *missing], 3)
    steered, held_out = (_change(demo, tasks) for tasks in (demo.steered, demo.held_out))
    yield (
        f"<p>Mean loss of the tasks that were steered for: {steered} than with a uniform mixture; of the tasks held "
        f"out: {held_out}.</p>"
    )
    yield _heading(3, "Losses")
    yield _losses(demo)
    yield _over_time(demo.tikmix.weights, demo.settings.steps)
    if demo.boundaries:
        last = demo.boundaries[-1]
        yield _heading(3, f"Influence at step {last.step}")
        yield from _matrix(last.matrix, 4)
    yield _costs(demo.seconds, {f"sequences {what}": count for what, count in demo.rows.items()})
    yield _details(
        "Settings and environment",
        _settings("Settings", demo.settings.to_dict())
        + _settings("Sources of the text", demo.sources)
        + _settings("Environment", demo.environment),
    )


def _losses(demo: DemoResult) -> str:
    rows = []
    charts = []
    for group, tasks in (("steered for", demo.steered), ("held out", demo.held_out)):
        for task in tasks:
            theirs, ours = demo.uniform.final[task], demo.tikmix.final[task]
            word = "better" if ours < theirs else "worse" if ours > theirs else "same"
            change = f"{100 * (ours / theirs - 1):+.1f} %, {word}"
            rows.append([_head(task), _cell(group), *(_cell(f"{loss:.3f}") for loss in (theirs, ours)), _cell(change)])
            lines = {
                name: [(step, losses[task]) for step, losses in arm.losses]
                for name, arm in (("TiKMiX-D", demo.tikmix), ("uniform", demo.uniform))
            }
            chart = loss_chart(lines, f"Loss of {task} over steps with both mixtures; final values are in the table")
            charts.append(f"<figure>{chart}<figcaption>{escape(task)}</figcaption></figure>")
    table = _table(
        "Loss after training, nats per byte, on text that was neither trained on nor measured",
        ["Task", "Group", "Uniform", "TiKMiX-D", "Change"],
        rows,
        kind="numbers",
    )
    legend = "<p>Curves: TiKMiX-D is the solid line, uniform the dashed one; nats per byte over steps.</p>"
    return table + legend + f'<div class="charts">{"".join(charts)}</div>'


def _change(demo: DemoResult, tasks: tuple[str, ...]) -> str:
    if not tasks:
        return "none"
    change = demo.change(tasks)
    return f"<b>{abs(change):.1%} {'lower' if change < 0 else 'higher'}</b>"


def _over_time(weights: Sequence[tuple[int, Mapping[str, float]]], steps: int) -> str:
    return (
        _heading(3, "Mixture over time")
        + '<figure><div class="picture">'
        + mixture_chart(weights, steps, "Weights of the domains over steps, stacked")
        + "</div><figcaption>The table below has the same numbers.</figcaption></figure>"
        + _weights(weights, "Weights over time", step="step ")
    )


def _weights(weights: Sequence[tuple[int, Mapping[str, float]]], caption: str, step: str = "") -> str:
    first, last = weights[0][1], weights[-1][1]
    highest = max(max(mixture.values()) for _, mixture in weights)
    rows = []
    for domain in sorted(last, key=lambda each: -last[each]):
        curve = sparkline([mixture[domain] for _, mixture in weights], highest)
        change = 100 * (last[domain] - first[domain])
        numbers = (f"{first[domain]:.1%}", f"{last[domain]:.1%}", f"{change:+.1f} points")
        before, after, moved = map(_cell, numbers)
        rows.append([_head(domain), before, f"<td>{curve}</td>", after, moved])
    heads = [f"{step}{weights[0][0]}", "Course", f"{step}{weights[-1][0]}"] if step else ["Before", "Course", "After"]
    return _table(caption, ["Domain", *heads, "Change"], rows, kind="numbers")


def _costs(seconds: Mapping[str, float], more: Mapping[str, Any]) -> str:
    rows = [[_head(what), _cell(f"{float(taken):.1f} s")] for what, taken in seconds.items()]
    rows += [[_head(what), _cell(str(value))] for what, value in more.items()]
    return _heading(3, "Costs") + _table("Wall time by kind of work, and what else it took", ["What", "Cost"], rows)


def _warnings(warnings: Sequence[Any], level: int) -> str:
    if not warnings:
        return "<p>Nothing to warn of.</p>"
    items = "".join(f"<li>{escape(str(each))}</li>" for each in warnings)
    return f'<div class="warning">{_heading(level, "Beware")}<ul>{items}</ul></div>'


def _settings(caption: str, settings: Mapping[str, Any]) -> str:
    rows = [[_head(name), _cell(value)] for name, value in _flat(settings)]
    return _table(caption, ["Name", "Value"], rows)


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name} / ")
        elif isinstance(value, list):
            yield f"{before}{name}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{before}{name}", "none" if value is None else str(value)


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "plain") -> str:
    label = escape(f"Table: {caption.partition('. ')[0]}", quote=True)
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in heads)
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in rows)
    # No <caption>, which would scroll away: what is wider than the screen scrolls by itself, also with the keyboard.
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><div class="scroll" role="group" tabindex="0" '
        f'aria-label="{label}"><table class="{kind}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>'
        "</div></figure>"
    )


def _head(text: str) -> str:
    return f'<th scope="row">{escape(text)}</th>'


def _cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _heading(level: int, text: str) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def _number(value: Any, digits: int = 6) -> str:
    if value is None or not np.isfinite(float(value)):
        return "unknown"
    return f"{float(value):.{digits}g}"
