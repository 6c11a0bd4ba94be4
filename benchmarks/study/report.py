"""Write the tables (report.md) and the pictures of a study, finished or not.

python -m benchmarks.study.report DIR                        # from a folder of results, into that folder
python -m benchmarks.study.report DIR --out WHERE            # into another one, with a summary.json to keep
python -m benchmarks.study.report WHERE/summary.json         # again, from that summary

If WHERE/reading.md exists, its words stand first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.comparisons import (
    OURS,
    REFERENCE,
    Array,
    Results,
    changes,
    in_order,
    interval,
    last_weights,
    mixing_flops,
    plateau,
    steered_and_held_out,
)
from benchmarks.study.pictures import draw_changes, draw_influence, draw_weights
from benchmarks.study.problem import EARLY, NOISE, SHORT
from benchmarks.study.run import FORMAT
from tikmix_fast import files
from tikmix_fast.report.pictures import save_figure


def load(path: Path) -> Results:
    """Read every result in a folder, or a summary.

    Raises
    ------
    ValueError
        If there are no results, or they come from several settings or texts.
    """
    if path.is_file():
        contents = json.loads(path.read_text(encoding="utf-8"))["results"]
    else:
        contents = [json.loads(each.read_text(encoding="utf-8")) for each in sorted(path.glob("*-*.json"))]
    return collect(contents, str(path))


def collect(contents: list[Any], where: str) -> Results:
    """Sort the results of the study by arm and seed, and ignore other content; see `load`."""
    results: Results = {}
    made_with = set()
    for content in contents:
        if isinstance(content, dict) and content.get("format") == FORMAT:
            results.setdefault(content["arm"], {})[content["seed"]] = content
            made_with.add((json.dumps(content["settings"], sort_keys=True), content["fingerprint"]))
    if len(made_with) != 1:
        raise ValueError(f"{where} must hold results of one study; it holds those of {len(made_with)}")
    return results


def summarise(results: Results, environment: Path) -> dict[str, Any]:
    """Return everything that the report needs; loss curves are left out."""
    runs = [run for by_seed in results.values() for run in by_seed.values()]
    return {
        "environment": json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else None,
        "results": [{name: value for name, value in run.items() if name != "curve"} for run in runs],
    }


def arm_table(results: Results) -> str:
    """Return every arm against the uniform mixture: losses, weights to watch, and cost."""
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
    """Return the goals, the results, and whether each goal is reached."""
    steered, held_out = steered_and_held_out(results)
    lines = ["| goal | found | reached |", "|---|---|---|"]

    def add(goal: str, result: str, reached: bool) -> None:
        lines.append(f"| {goal} | {result} | {'yes' if reached else 'no'} |")

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


def write(results: Results, folder: Path, reading: str = "") -> Path:
    """Write report.md and its pictures into ``folder``; return the path of the report."""
    save_figure(draw_changes(results), folder / "changes.png")
    arms = [name for name in (OURS, "tikmix-d in-run", "dga", "odm", plateau(results)) if name in results]
    save_figure(draw_weights(results, arms), folder / "weights.png")
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
    parser.add_argument("--seeds", type=int, nargs="+", help="report only these seeds")
    arguments = parser.parse_args()
    results = load(arguments.path)
    if arguments.seeds:
        some = {arm: {s: run for s, run in runs.items() if s in arguments.seeds} for arm, runs in results.items()}
        results = {arm: runs for arm, runs in some.items() if runs}
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
