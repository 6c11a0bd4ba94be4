"""Scores, tables and plots of the prediction study, from the files of its parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr

from benchmarks.study.ranks import spearman_by_task
from tikmix_fast import files
from tikmix_fast.report.pictures import new_figure, save_figure

Array = NDArray[np.float64]
Parts = dict[str, dict[int, dict[str, Any]]]
"""The stored results, by part and seed."""

SECOND_RUN = "a second real run"
WITHOUT_NOISE = "S without noise would reach about"
BAR = 0.97
"""The Pearson's r that additivity must reach."""

_RATES = {"1": "full rate", "0.1": "a tenth of it"}
_COLOURS = ("#0077BB", "#EE7733", "#009988", "#CC3311", "#AA4499", "#DDAA33")


def write_report(folder: Path, seeds: Sequence[int], setting: str, results: Path) -> list[Path]:
    """Write prediction.json, prediction.md and prediction.png from the parts in ``folder``; return their paths."""
    parts: Parts = {}
    for part in ("additivity", "counterfactual", "long", "calibration"):
        paths = {seed: folder / f"{part}-{seed}.json" for seed in seeds}
        parts[part] = {seed: json.loads(path.read_text("utf-8")) for seed, path in paths.items() if path.exists()}
    scores = summarise(parts)
    first = next((each for of_part in parts.values() for each in of_part.values()), None)
    if first is None:
        raise ValueError(f"{folder} must hold results of seeds {list(seeds)}; it holds none: run the study first")
    content = {
        "date": first["date"],
        "environment": first["environment"],
        "setting": setting,
        "settings": json.loads((folder / "settings.json").read_text("utf-8")),
        "seeds": {part: sorted(of_part) for part, of_part in parts.items()},
        "cpu_seconds": {part: sum(each["cpu_seconds"] for each in of_part.values()) for part, of_part in parts.items()},
        "domains": first["domains"],
        "tasks": first["tasks"],
        **scores,
    }
    results.mkdir(parents=True, exist_ok=True)
    reading = results / "prediction_reading.md"
    words = reading.read_text("utf-8") if reading.exists() else ""
    return [
        files.write_json(results / "prediction.json", content),
        files.write_text(results / "prediction.md", markdown(content, words)),
        save_figure(draw(parts, content), results / "prediction.png"),
    ]


def summarise(parts: Parts) -> dict[str, Any]:
    """Return the scores of every part, seed by seed."""
    return {
        "additivity": {seed: additivity_scores(each) for seed, each in parts["additivity"].items()},
        "counterfactual": {
            seed: counterfactual_scores(each, parts["long"].get(seed)) for seed, each in parts["counterfactual"].items()
        },
        "calibration": {seed: calibration_scores(each) for seed, each in parts["calibration"].items()},
    }


def additivity_scores(result: dict[str, Any]) -> dict[str, Any]:
    """Return Pearson's r of S w with the measured influence, per task, and the r that sampling alone allows."""
    predicted, measured = np.array(result["predicted"]), np.array(result["measured"])
    noises = np.array(result["noise_predicted"]), np.array(result["noise_measured"])
    true = np.maximum(predicted.var(1, ddof=1) - noises[0], 0)

    def ceiling(more: float) -> Array:
        """Return the r that sampling allows with ``more`` times the tokens, and so less noise."""
        return np.asarray(true / np.sqrt((true + noises[0] / more) * (true + noises[1] / more)))

    more = next((each for each in np.geomspace(1, 1e4, 200) if np.median(ceiling(each)) >= BAR), np.nan)
    return {
        "times_tokens_for_bar": None if np.isnan(more) else float(more),
        "r": [float(pearsonr(*pair).statistic) for pair in zip(predicted, measured, strict=True)],
        "ceiling": ceiling(1.0).tolist(),
        "tokens_per_mixture": result["tokens_per_mixture"],
        "tokens_per_domain": result["tokens_per_domain"],
    }


def counterfactual_scores(result: dict[str, Any], long: dict[str, Any] | None) -> dict[str, Any]:
    """Return by judge ("validation", "unseen") and "RATE/STEPS" the score of every method against the real runs.

    A score is the mean of the rank agreement with either run. The score of `SECOND_RUN` compares the two runs.
    """
    scores: dict[str, Any] = {}
    for judge, gains in result["gains"].items():
        scores[judge] = {}
        for cell, draws in {**gains, **(long["gains"][judge] if long else {})}.items():
            one, two = np.array(draws)
            scores[judge][cell] = {
                name: float(np.mean([spearman_by_task(values, each).mean() for each in (one, two)]))
                for name, values in result["influence"].items()
            }
            scores[judge][cell][SECOND_RUN] = float(spearman_by_task(one, two).mean())
    return scores


def calibration_scores(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the share of intervals that hold the truth and its standard error over repetitions.

    The cells of one repetition share sequences, so a repetition counts as one observation: the share of its cells.
    """
    return {
        name: {"share": float(np.mean(shares)), "error": float(np.std(shares, ddof=1) / np.sqrt(len(shares)))}
        for name, shares in result["shares"].items()
    }


def _spread(values: Iterable[float], digits: int = 2) -> str:
    each = list(values)
    mean = f"{np.mean(each):.{digits}f}"
    return mean if len(each) < 2 else f"{mean} ({min(each):.{digits}f} to {max(each):.{digits}f})"


def _tokens_needed(times: Sequence[float | None]) -> str:
    bar = f"a ceiling of {BAR} (median over tasks)"
    if all(each is not None and each <= 1 for each in times):
        return f"These tokens suffice for {bar}."
    return f"For {bar} both sides need {_spread((each or np.nan for each in times), 0)} times these tokens."


def _cell_title(cell: str) -> str:
    rate, steps = cell.split("/")
    return f"{_RATES.get(rate, rate)}, k = {steps}"


def markdown(content: dict[str, Any], words: str) -> str:
    """Return the tables in Markdown, with ``words`` below the first line."""
    lines = [
        "# Does S predict?",
        "",
        f"Written by `python -m benchmarks.study.prediction --report` from `prediction.json`: setting "
        f"`{content['setting']}`, seeds {', '.join(str(seed) for seed in content['seeds']['counterfactual'])}, "
        f"{content['date']}, commit {content['environment']['commit']}, "
        f"{content['environment']['machine']['processor']}. Numbers are means over seeds, in brackets the "
        "lowest and the highest seed.",
        "",
    ]
    if words:
        lines += [words.strip(), ""]
    if content["additivity"]:
        lines += _additivity_lines(content)
    if content["counterfactual"]:
        lines += _counterfactual_lines(content)
    if content["calibration"]:
        lines += _calibration_lines(content)
    return "\n".join(lines)


def _additivity_lines(content: dict[str, Any]) -> list[str]:
    seeds = list(content["additivity"].values())

    def row(title: str, r: Iterable[float], ceiling: Iterable[float]) -> str:
        return f"| {title} | {_spread(r, 3)} | {_spread(ceiling, 3)} |"

    return [
        "## Additivity",
        "",
        f"Pearson's r of S w with the influence of sampled mixtures (Dirichlet(1)), "
        f"{seeds[0]['tokens_per_mixture']:,.0f} tokens per mixture, {seeds[0]['tokens_per_domain']:,.0f} per domain "
        "for S, preconditioner adam with floor 1. At fixed weights influence is linear in the data, so only sampling "
        "can lower r: the ceiling is the r that sampling of both sides allows. Both sides draw their sequences from "
        "the same finite pools, with repetition where a pool is too small, so they differ a little less than the "
        f"ceiling assumes: it is slightly low. Seeds {', '.join(map(str, content['additivity']))}.",
        "",
        "| task | r | ceiling |",
        "|---|---:|---:|",
        *(
            row(task, (each["r"][index] for each in seeds), (each["ceiling"][index] for each in seeds))
            for index, task in enumerate(content["tasks"])
        ),
        row("**mean**", (np.mean(each["r"]) for each in seeds), (np.mean(each["ceiling"]) for each in seeds)),
        "",
        _tokens_needed([each["times_tokens_for_bar"] for each in seeds]),
        "",
    ]


def _counterfactual_lines(content: dict[str, Any]) -> list[str]:
    settings = content["settings"]
    titles = {
        "validation": f"Loss of the validation sets ({settings['validation_rows']} sequences a task), the loss of S:",
        "unseen": f"Loss of other text of the tasks ({settings['unseen_rows']} sequences a task), which S never saw:",
    }
    lines = [
        "## S against real loss changes",
        "",
        "After k optimizer steps on one domain from the checkpoint (AdamW with its state, clipping and decay as in "
        "training, at the rate of the checkpoint or a tenth of it): Spearman over domains, per task, then the mean, "
        "against each of two runs on different sequences. The last row but one compares the two runs. Both are noisy, "
        "so an S without noise would agree with either about as well as the root of that.",
        "",
    ]
    for judge, title in titles.items():
        seeds, cells = _cells(content, judge)
        lines += [title, "", "| S by | " + " | ".join(map(_cell_title, cells)) + " |", "|---|" + "---:|" * len(cells)]
        for method in seeds[0][cells[0]]:
            row = [_spread(each[cell][method] for each in seeds if cell in each) for cell in cells]
            lines.append(f"| {method} | " + " | ".join(row) + " |")
        row = [_spread(np.sqrt(max(each[cell][SECOND_RUN], 0.0)) for each in seeds if cell in each) for cell in cells]
        lines += [f"| {WITHOUT_NOISE} | " + " | ".join(row) + " |", ""]
    return lines


def _cells(content: dict[str, Any], judge: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the scores of every seed, and the "RATE/STEPS" of any of them."""
    seeds = [each[judge] for each in content["counterfactual"].values()]
    return seeds, list(dict.fromkeys(cell for each in seeds for cell in each))


def _calibration_lines(content: dict[str, Any]) -> list[str]:
    seeds = list(content["calibration"].values())
    lines = [
        "## Error bars",
        "",
        "Share of 95% intervals that hold the truth, over repeated measurements of the demonstration's size. The error "
        "counts a repetition as one observation, because its cells share sequences.",
        "",
        "| measured with | inside | error of that, per seed |",
        "|---|---:|---:|",
    ]
    for name in seeds[0]:
        shares = [100 * each[name]["share"] for each in seeds]
        errors = [100 * each[name]["error"] for each in seeds]
        lines.append(f"| {name} | {_spread(shares, 1)} % | {_spread(errors, 2)} points |")
    return [*lines, ""]


def draw(parts: Parts, content: dict[str, Any]) -> Any:
    """Draw additivity, counterfactuals and calibration side by side."""
    figure, ((scatter, bars, inside),) = new_figure(17, 5.2, 1, 3)
    if parts["additivity"]:
        _draw_additivity(scatter, next(iter(parts["additivity"].values())))
    if content["counterfactual"]:
        _draw_counterfactual(bars, content)
    if content["calibration"]:
        _draw_calibration(inside, content["calibration"])
    for panel in (scatter, bars, inside):
        if not panel.has_data():
            panel.set_axis_off()
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_additivity(panel: Any, result: dict[str, Any]) -> None:
    for index, task in enumerate(result["tasks"]):
        predicted, measured = np.array(result["predicted"][index]), np.array(result["measured"][index])
        # Both axes have one scale, so the diagonal stays the diagonal.
        middle, scale = measured.mean(), measured.std() or 1.0
        panel.plot((predicted - middle) / scale, (measured - middle) / scale, ".", markersize=4, alpha=0.5, label=task)
    low, high = panel.get_xlim()
    panel.plot([low, high], [low, high], color="#777777", linewidth=1)
    panel.legend(fontsize=7, frameon=False, markerscale=2)
    panel.set_title(f"S w and the influence of {len(result['predicted'][0])} sampled mixtures", loc="left")
    panel.set_xlabel("S w (deviations, per task)")
    panel.set_ylabel("measured")


def _draw_counterfactual(panel: Any, content: dict[str, Any]) -> None:
    seeds, cells = _cells(content, "validation")
    exact = [name for name in seeds[0][cells[0]] if name != SECOND_RUN and ", k=" not in name]
    methods = exact[: len(_COLOURS)]
    width = 0.8 / max(1, len(methods))
    for number, method in enumerate(methods):
        values = [[each[cell][method] for each in seeds if cell in each] for cell in cells]
        where = np.arange(len(cells)) - 0.4 + (number + 0.5) * width
        panel.bar(where, [np.mean(each) for each in values], 0.92 * width, color=_COLOURS[number], label=method)
        for place, each in zip(where, values, strict=True):
            panel.plot([place] * len(each), each, ".", color="black", markersize=4)
    for place, cell in enumerate(cells):
        ceiling = np.mean([each[cell][SECOND_RUN] for each in seeds if cell in each])
        label = SECOND_RUN if not place else None
        panel.plot([place - 0.42, place + 0.42], [ceiling] * 2, color="black", linewidth=2, label=label)
    panel.set_xticks(range(len(cells)), [_cell_title(cell).replace(", ", "\n") for cell in cells], fontsize=9)
    panel.set_ylim(min(0, panel.get_ylim()[0]), 1.35)  # room for the legend
    panel.set_yticks(np.arange(0, 1.01, 0.2))
    panel.legend(ncols=2, fontsize=8, frameon=False, loc="upper left")
    panel.set_title("S against real loss changes: Spearman over domains", loc="left")


def _draw_calibration(panel: Any, seeds: dict[Any, dict[str, dict[str, float]]]) -> None:
    for number, name in enumerate(next(iter(seeds.values()))):
        shares = [100 * each[name]["share"] for each in seeds.values()]
        errors = [200 * each[name]["error"] for each in seeds.values()]
        where = np.arange(len(shares)) + 0.15 * number
        panel.errorbar(where, shares, errors, fmt="o", capsize=3, color=_COLOURS[number], label=name)
    panel.axhspan(92, 97, color="#EEEEEE", zorder=0)
    panel.axhline(95, color="#777777", linewidth=1)
    panel.set_xticks(range(len(seeds)), [f"seed {seed}" for seed in seeds])
    panel.set_xlim(-0.5, len(seeds) - 0.2)
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, 90), max(high, 99))
    panel.legend(fontsize=8, frameon=False)
    panel.set_title("95% intervals that hold the truth, %  (band: the bar)", loc="left")
