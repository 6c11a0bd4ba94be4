"""Write the tables (report.md) and the pictures of a study, finished or not.

python benchmarks/study/report.py DIR                        # of a folder of results, into that folder
python benchmarks/study/report.py DIR --out WHERE            # into another one, with a summary.json for keeping
python benchmarks/study/report.py WHERE/summary.json         # once more from that

What a person has to say about the results stands in WHERE/reading.md and is put first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.study.problem import EARLY, NOISE, SHORT
from benchmarks.study.run import FORMAT
from tikmix_fast import files
from tikmix_fast.report.plots import new_figure, save_figure

Array = NDArray[np.float64]
Results = dict[str, dict[int, dict[str, Any]]]
"""By arm and seed."""

REFERENCE, OURS = "uniform", "tikmix-d"
_COLOURS = (
    "#332288",
    "#88CCEE",
    "#117733",
    "#DDCC77",
    "#CC6677",
    "#44AA99",
    "#AA4499",
    "#999933",
    "#882255",
    "#661100",
)
_GREY = "#BBBBBB"


def load(path: Path) -> Results:
    """Read every result in a folder, or a summary.

    Raises
    ------
    ValueError
        If there are none, or they are of several settings or texts.
    """
    if path.is_file():
        contents = json.loads(path.read_text(encoding="utf-8"))["results"]
    else:
        contents = [json.loads(each.read_text(encoding="utf-8")) for each in sorted(path.glob("*-*.json"))]
    return collect(contents, str(path))


def collect(contents: list[Any], where: str) -> Results:
    """Sort what is a result of the study, by arm and seed; see `load`."""
    found: Results = {}
    made_with = set()
    for content in contents:
        if isinstance(content, dict) and content.get("format") == FORMAT:
            found.setdefault(content["arm"], {})[content["seed"]] = content
            made_with.add((json.dumps(content["settings"], sort_keys=True), content["fingerprint"]))
    if len(made_with) != 1:
        raise ValueError(f"{where} must hold results of one study; it holds those of {len(made_with)}")
    return found


def summarise(results: Results, environment: Path) -> dict[str, Any]:
    """Return all that the report needs, without loss curves."""
    runs = [run for by_seed in results.values() for run in by_seed.values()]
    return {
        "environment": json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else None,
        "results": [{name: value for name, value in run.items() if name != "curve"} for run in runs],
    }


def steered_and_held_out(results: Results) -> tuple[list[str], list[str]]:
    """Return the names of the tasks steered for and of the others."""
    content = next(iter(next(iter(results.values())).values()))
    return content["steered"], [name for name in content["final"] if name not in content["steered"]]


def changes(results: Results, arm: str, base: str, tasks: Sequence[str]) -> Array:
    """Return the relative change of the mean loss of ``tasks`` from ``base`` to ``arm``, for each seed both have."""
    return np.array(
        [
            np.mean([results[arm][seed]["final"][task] for task in tasks])
            / np.mean([results[base][seed]["final"][task] for task in tasks])
            - 1
            for seed in sorted(set(results[arm]) & set(results.get(base, {})))
        ]
    )


def interval(values: Array) -> tuple[float, float]:
    """Return the mean and half the width of its 95% t interval: NaN below two values."""
    if not len(values):
        return np.nan, np.nan
    if len(values) < 2:
        return float(values.mean()), np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def last_weights(results: Results, arm: str, domain: str) -> Array:
    """Return the weight of ``domain`` at the end over its uniform weight, for each seed."""
    ends = [each["mixtures"][-1]["domains"] for each in results[arm].values()]
    return np.array([weights[domain] * len(weights) for weights in ends])


def mixing_flops(results: Results, arm: str) -> float:
    """Return the mean operations spent on choosing the mixture."""
    return float(np.mean([each["flops"]["mixing"] for each in results[arm].values()]))


def plateau(results: Results) -> str | None:
    """Return the cheapest RegMix whose steered loss is not reliably above the best one's."""
    counts = sorted((name for name in results if name.startswith("regmix")), key=lambda name: int(name.split()[1]))
    if not counts:
        return None
    steered, _ = steered_and_held_out(results)

    def mean_loss(name: str) -> float:
        return float(np.mean([each["final"][task] for each in results[name].values() for task in steered]))

    best = min(counts, key=mean_loss)
    for name in counts:
        mean, half = interval(changes(results, name, best, steered))
        if name == best or (mean - half <= 0):
            return name
    return best


def arm_table(results: Results) -> str:
    """Return every arm against the uniform mixture: losses, weights that should be small or watched, and cost."""
    steered, held_out = steered_and_held_out(results)
    lines = [
        "| arm | seeds | steered | held out | noise | fragments | docstrings, epochs | mixing FLOPs | of training |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in in_order(results):
        runs = list(results[arm].values())
        flops, training = mixing_flops(results, arm), runs[0]["flops"]["training"]
        epochs = np.mean([each["drawn"][SHORT] / each["sequences"][SHORT] for each in runs])
        lines.append(
            f"| {arm} | {len(runs)} | {percent(changes(results, arm, REFERENCE, steered))} "
            f"| {percent(changes(results, arm, REFERENCE, held_out))} "
            f"| {last_weights(results, arm, NOISE).mean():.2f} | {last_weights(results, arm, EARLY).mean():.2f} "
            f"| {epochs:.1f} | {f'{flops:.2g}' if flops else '0'} | {flops / training:.1%} |"
        )
    return "\n".join(lines)


def task_table(results: Results) -> str:
    """Return every task's loss under the uniform mixture and TiKMiX-D, and its paired change."""
    steered, held_out = steered_and_held_out(results)
    lines = ["| task | uniform | TiKMiX-D | change |", "|---|---:|---:|---:|"]
    for group, tasks in (("steered for", steered), ("held out", held_out)):
        for names, label in [*(([name], name) for name in tasks), (tasks, "**mean**")]:
            theirs, ours = (
                np.mean([each["final"][name] for each in results[arm].values() for name in names])
                for arm in (REFERENCE, OURS)
            )
            change = percent(changes(results, OURS, REFERENCE, names))
            lines.append(f"| {label} ({group}) | {theirs:.3f} | {ours:.3f} | {change} |")
    return "\n".join(lines)


def bar_table(results: Results) -> str:
    """Return the goals, what was found, and whether it was reached."""
    steered, held_out = steered_and_held_out(results)
    lines = ["| goal | found | reached |", "|---|---|---|"]

    def add(goal: str, found: str, reached: bool) -> None:
        lines.append(f"| {goal} | {found} | {'yes' if reached else 'no'} |")

    regmix = plateau(results)
    if regmix:
        values = changes(results, OURS, regmix, steered)
        mean, half = interval(values)
        add(f"TiKMiX-D better than {regmix} (its plateau), 95% interval excludes 0", percent(values), mean + half < 0)
        share = mixing_flops(results, OURS) / mixing_flops(results, regmix)
        add(f"mixing FLOPs at most 20% of {regmix}", f"{share:.0%}", share <= 0.2)
        others = [name for name in results if name.startswith("regmix") and name != regmix]
        for other in sorted(others, key=lambda name: int(name.split()[1])):
            values = changes(results, OURS, other, steered)
            mean, half = interval(values)
            add(f"TiKMiX-D better than {other}, 95% interval excludes 0", percent(values), mean + half < 0)
    for arm, reference in (("tikmix-d in-run", regmix), ("tikmix-m linear", OURS), ("tikmix-m probe", OURS)):
        if reference and arm in results:
            values = changes(results, arm, reference, steered)
            mean, half = interval(values)
            add(f"{arm} better than {reference}, 95% interval excludes 0", percent(values), mean + half < 0)
    better = [task for task in steered if changes(results, OURS, REFERENCE, [task]).mean() < 0]
    values = changes(results, OURS, REFERENCE, steered)
    add(
        f"against uniform -2% on {len(steered)} steered tasks, most of them better",
        f"{percent(values)}; {len(better)} of {len(steered)} better",
        values.mean() <= -0.02 and len(better) > len(steered) / 2,
    )
    values = changes(results, OURS, REFERENCE, held_out)
    add("held-out tasks no worse than +1%", percent(values), values.mean() <= 0.01)
    noise = last_weights(results, OURS, NOISE)
    mean, half = interval(noise)
    add("noise below 0.5 of uniform at the end", f"{mean:.2f} ± {half:.2f}", mean < 0.5)
    return "\n".join(lines)


def percent(values: Array) -> str:
    """Return the mean and its interval in percent."""
    mean, half = interval(values)
    if np.isnan(mean):
        return "-"
    return f"{mean:+.1%}" if np.isnan(half) else f"{mean:+.1%} ± {half:.1%}"


def in_order(results: Results) -> list[str]:
    """Return the arms from the one with the lowest steered loss, by the paired change."""
    steered, _ = steered_and_held_out(results)
    found = {arm: changes(results, arm, REFERENCE, steered) for arm in results}
    return sorted(found, key=lambda arm: float(found[arm].mean()) if len(found[arm]) else np.inf)


def draw_changes(results: Results) -> Any:
    """Draw every arm's paired changes with intervals, the noise domain's weight, and the cost."""
    steered, held_out = steered_and_held_out(results)
    order = in_order(results)[::-1]
    figure, axes = new_figure(14, 0.6 + 0.36 * len(order), columns=4)
    places = np.arange(len(order))
    panels = [
        ("steered tasks, change from uniform", [100 * changes(results, arm, REFERENCE, steered) for arm in order]),
        ("held-out tasks, change from uniform", [100 * changes(results, arm, REFERENCE, held_out) for arm in order]),
        ("weight of noise at the end, 1 = uniform", [last_weights(results, arm, NOISE) for arm in order]),
    ]
    for panel, (title, values) in zip(axes[0, :3], panels, strict=True):
        for place, arm, each in zip(places, order, values, strict=True):
            if not len(each):
                continue
            mean, half = interval(each)
            colour = _COLOURS[4] if arm.startswith("tikmix") else _COLOURS[0]
            panel.plot(each, np.full(len(each), place), ".", color=_GREY, markersize=5, zorder=1)
            panel.errorbar(mean, place, xerr=half, fmt="o", color=colour, markersize=5, capsize=3, zorder=2)
        panel.axvline(1 if "weight" in title else 0, color="#999999", linewidth=0.8, zorder=0)
        if "weight" in title:
            panel.set_xlim(-0.1, 1.1 * max(2.0, *(each.max() for each in values)))  # some intervals reach further
        panel.set_title(title, fontsize=10, loc="left")
        if "weight" not in title:
            panel.xaxis.set_major_formatter("{x:+g}%")
    cost = axes[0, 3]
    cost.barh(
        places, [mixing_flops(results, arm) for arm in order], height=0.6,
        color=[_COLOURS[4] if arm.startswith("tikmix") else _COLOURS[0] for arm in order],
    )  # fmt: skip
    cost.set_xscale("log")
    cost.xaxis.set_minor_formatter("")
    cost.set_title("FLOPs spent on mixing", fontsize=10, loc="left")
    for index, panel in enumerate(axes[0]):
        panel.set_ylim(-0.6, len(order) - 0.4)
        panel.set_yticks(places, order if index == 0 else [""] * len(order))
        panel.tick_params(labelsize=9, left=False)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", color="#eeeeee", zorder=0)
        panel.set_axisbelow(True)
    return figure


def draw_weights(results: Results, arms: Sequence[str]) -> Any:
    """Draw the mean mixture of some arms over training, stacked."""
    figure, axes = new_figure(3.4 * len(arms) + 1.6, 3.4, columns=len(arms))
    panels = axes[0] if len(arms) > 1 else [axes]
    for panel, arm in zip(panels, arms, strict=True):
        runs = list(results[arm].values())
        domains, steps = list(runs[0]["drawn"]), runs[0]["settings"]["main"]["steps"]
        grid = np.arange(steps)
        mean = np.mean([mixture_at(run["mixtures"], domains, grid) for run in runs], axis=0)
        colours = [*_COLOURS[: len(domains) - 1], _GREY]
        panel.stackplot(grid, mean, colors=colours, labels=domains, linewidth=0.4, edgecolor="white")
        panel.set(xlim=(0, steps), ylim=(0, 1), xlabel="step")
        panel.set_title(arm, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("weight in the mixture")
    handles, labels = panels[-1].get_legend_handles_labels()
    panels[-1].legend(
        handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    return figure


def mixture_at(mixtures: Sequence[Mapping[str, Any]], domains: Sequence[str], steps: NDArray[np.int64]) -> Array:
    """Return the weights [m, len(steps)] that held at ``steps``."""
    starts = [each["step"] for each in mixtures]
    weights = np.array([[each["domains"][name] for name in domains] for each in mixtures])
    return np.asarray(weights[np.searchsorted(starts, steps, side="right") - 1].T)


def draw_influence(results: Results) -> Any:
    """Draw how the influence of the domains made for this study changes: mean over tasks, in each task's maximum."""
    runs = list(results[OURS].values())
    domains = list(runs[0]["drawn"])
    steps = [each["step"] for each in runs[0]["log"]]
    shares = []
    for run in runs:
        values = np.array([each["influence"] for each in run["log"]], dtype=np.float64)  # [stage, n, m]
        shares.append((values / np.nanmax(np.abs(values), axis=2, keepdims=True)).mean(1))
    mean, spread = np.mean(shares, axis=0), np.std(shares, axis=0)
    figure, axes = new_figure(5.6, 3.4)
    for name, colour in ((SHORT, _COLOURS[0]), ("python", _COLOURS[2]), (EARLY, _COLOURS[4]), (NOISE, "#777777")):
        j = domains.index(name)
        axes.errorbar(steps, mean[:, j], spread[:, j], color=colour, marker="o", markersize=4, capsize=3, label=name)
    axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)
    axes.set(xlabel="step", ylabel="influence, share of each task's largest")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write(results: Results, folder: Path, reading: str = "") -> Path:
    """Write report.md and its pictures into ``folder``; returns the report."""
    save_figure(draw_changes(results), folder / "changes.png")
    shown = [name for name in (OURS, "tikmix-d in-run", "dga", "odm", plateau(results)) if name in results]
    save_figure(draw_weights(results, shown), folder / "weights.png")
    parts = [
        "# Study",
        reading,
        "Change of the mean loss (nats per byte, text nobody trained on or measured) from uniform at equal tokens, "
        "paired by seed, with 95% t intervals. Weights are at the end, 1 = uniform.",
        arm_table(results),
        "![Paired changes, noise and cost](changes.png)",
    ]
    if OURS in results and REFERENCE in results:
        save_figure(draw_influence(results), folder / "influence.png")
        parts += [
            "## Goals", bar_table(results), "## Every task", task_table(results),
            "## How influence changes", "![Influence by stage](influence.png)",
        ]  # fmt: skip
    parts += ["## Mixtures", "![Mixtures over training](weights.png)"]
    return files.write_text(folder / "report.md", "\n\n".join(part for part in parts if part) + "\n")


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    arguments = parser.parse_args()
    results = load(arguments.path)
    if arguments.seeds:
        kept = {arm: {s: run for s, run in runs.items() if s in arguments.seeds} for arm, runs in results.items()}
        results = {arm: runs for arm, runs in kept.items() if runs}
    folder = arguments.path.parent if arguments.path.is_file() else arguments.path
    out = arguments.out or folder
    out.mkdir(parents=True, exist_ok=True)
    if out != folder:
        files.write_json(out / "summary.json", summarise(results, folder / "environment.json"))
    reading = out / "reading.md"
    print(write(results, out, reading.read_text(encoding="utf-8") if reading.exists() else ""))
    print(arm_table(results))


if __name__ == "__main__":
    main()
