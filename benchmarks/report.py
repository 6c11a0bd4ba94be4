"""Write what was measured into the README, between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.

python benchmarks/report.py             # rewrite the README, draw the roofline
python benchmarks/report.py --check     # exit 1 if it is not what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.tables import gpu_bars, gpu_facts, gpu_tables
from tikmix_fast import files
from tikmix_fast.report.benchmark_tables import TextTable, benchmark_facts, benchmark_tables, ops_summary

ROOT = Path(__file__).parent.parent


def demo_table(results: dict[str, Any]) -> str:
    """Return the table of the demonstration: every task's loss in both arms, and how it was measured."""
    seeds = results["seeds"]

    def cells(tasks: list[str]) -> str:
        theirs, ours = (
            np.array([[each[arm][task] for task in tasks] for each in seeds]).mean(1) for arm in ("uniform", "tikmix")
        )
        change = 100 * (ours / theirs - 1)
        spread = f" ± {change.std(ddof=1):.1f}" if len(seeds) > 1 else ""
        return f"{theirs.mean():.3f} | {ours.mean():.3f} | {change.mean():+.1f} %{spread}"

    lines = ["| task | uniform | TiKMiX-D | change |", "|---|---:|---:|---:|"]
    for group, tasks in (("steered for", results["steered"]), ("held out", results["held_out"])):
        lines += [f"| {task} ({group}: {results['sources'][task]}) | {cells([task])} |" for task in tasks]
        lines.append(f"| **mean, {group}** | {cells(tasks)} |")
    machine, packages = results["environment"]["machine"], results["environment"]["packages"]
    minutes = np.mean([each["wall_seconds"] for each in seeds]) / 60
    share = np.mean([each["seconds"]["measuring"] / sum(each["seconds"].values()) for each in seeds])
    commit = (results["environment"]["commit"] or "unknown").split()
    facts = (
        "Loss in nats per byte on text that was neither trained on nor measured; means over seeds "
        f"{', '.join(str(each['seed']) for each in seeds)}, the change with its standard deviation",
        f"{results['settings']['steps']} steps per arm; {minutes:.1f} minutes per seed for both arms, of which "
        f"{share:.0%} measuring",
        f"{machine['processor']}, {machine['threads']} threads, torch {packages['torch']}, commit "
        f"{' '.join([commit[0][:10], *commit[1:]])}, {results['date']}",
    )
    lines += ["", *(f"{fact}." for fact in facts)]
    return "\n".join(lines)


def ops_section(results: dict[str, Any]) -> str:
    """Return ours against the fastest other way, the roofline, and every method folded away."""
    return "\n\n".join(
        [
            ops_summary(results).to_markdown(),
            "Time of influence and total gradient together over that of the plain weight gradient alone, "
            "`grad_output.T @ input`, with the 95 % interval; extra memory is what the process grew by at the peak of "
            "a call, the total not counted; the error is max over cells of |dS_ij| / (|q_i| |g_j|) against float64. "
            f"The roofs are the fastest products and copy seen in the same run: {_roofs(results['rates'])}.",
            "![Operations per second of each case under the measured roofs](benchmarks/results/roofline.png)",
            _folded("Every method, case by case", benchmark_tables(results)),
            f"{benchmark_facts(results)}.",
        ]
    )


def _roofs(rates: dict[str, Any]) -> str:
    products = [f"{name} {peak / 1e9:.0f} GF/s ({rates['found_by'][name]})" for name, peak in rates["flops"].items()]
    return f"{', '.join(products)}, copy {rates['bandwidth'] / 1e9:.0f} GB/s"


def choice_section(results: dict[str, Any]) -> str:
    """Return the ways to group influence on a grid of shapes, folded."""
    folded = _folded("Which way is taken, by counting, and what each takes", benchmark_tables(results))
    return f"{folded}\n\nCPU time; {benchmark_facts(results)}."


def tables_section(*results: dict[str, Any]) -> str:
    """Return every table of the results, each under its title."""
    parts = [f"**{table.title}**\n\n{table.to_markdown()}" for each in results for table in benchmark_tables(each)]
    return "\n\n".join([*parts, *dict.fromkeys(f"{benchmark_facts(each)}." for each in results)])


def _folded(title: str, tables: list[TextTable]) -> str:
    inner = "\n\n".join(f"**{table.title}**\n\n{table.to_markdown()}" for table in tables)
    return f"<details><summary>{title}</summary>\n\n{inner}\n\n</details>"


def gpu_section(*results: dict[str, Any]) -> str:
    """Return the goals and the machine of every GPU, newest first, everything else folded; or that there are none."""
    if not results:
        return "No results on a GPU yet: `python benchmarks/gpu.py` makes them on a machine with one."
    parts = []
    for result in sorted(results, key=_newest_date, reverse=True):
        goals = gpu_bars(result)
        others = [table for table in gpu_tables(result) if table.title != goals.title]
        parts.append(f"**{result['device']['name']}**\n\n{goals.to_markdown()}")
        parts += [_folded(f"Everything on {result['device']['name']}", others), f"{gpu_facts(result)}."]
    return "\n\n".join(parts)


def _newest_date(result: dict[str, Any]) -> str:
    return max((part["date"] for part in result["parts"].values()), default="")


def study_section(results: dict[str, Any]) -> str:
    """Return every arm of the study of mixtures against the uniform mixture, and how it was measured."""
    from benchmarks.study.report import arm_table, collect  # with the arms, and so torch

    arms = collect(results["results"], "summary.json")
    environment = results["environment"]
    settings = next(iter(arms["uniform"].values()))["settings"]["main"]
    tokens = settings["steps"] * settings["batch"] * settings["model"]["length"]
    return (
        f"{arm_table(arms)}\n\n"
        "Change of the mean loss from the uniform mixture at equal tokens, paired by seed, with 95 % t intervals; "
        f"weights at the end, 1 = uniform. {tokens / 1e6:.1f} million bytes per arm; "
        f"{environment['machine']['processor']}, torch {environment['packages']['torch']}, commit "
        f"{environment['commit'][:10]}, {environment['date']}."
    )


RESULTS = "benchmarks/results"
SECTIONS: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "demo": (("demo.json",), demo_table),
    "study": (("study/summary.json",), study_section),
    "ops": (("ops.json",), ops_section),
    "choice": (("choice.json",), choice_section),
    "engine": (("engine.json",), tables_section),
    "mixture": (("mixture.json", "sampler.json"), tables_section),
    "gpu": (("gpu-*.json",), gpu_section),
}


def section(name: str) -> str:
    """Return what belongs between the marks of ``name``: a sentence where there are no results yet."""
    names, make = SECTIONS[name]
    if "*" in names[0]:  # as many as there are, and none is fine
        paths = sorted((ROOT / RESULTS).glob(names[0]))
        return make(*(json.loads(path.read_text(encoding="utf-8")) for path in paths))
    paths = [ROOT / RESULTS / each for each in names]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        return f"No results yet: `python benchmarks/run.py` makes {' and '.join(missing)}."
    return make(*(json.loads(path.read_text(encoding="utf-8")) for path in paths))


def draw_pictures() -> None:
    """Draw the pictures that are made of results alone."""
    from tikmix_fast.report.plots import save_figure
    from tikmix_fast.report.roofline import draw_roofline

    path = ROOT / RESULTS / "ops.json"
    if path.exists():
        save_figure(draw_roofline(json.loads(path.read_text(encoding="utf-8"))), path.with_name("roofline.png"))


def rewrite(text: str, name: str, content: str) -> str:
    """Return ``text`` with ``content`` between the marks of ``name``.

    Raises
    ------
    ValueError
        If the marks are not there exactly once each, in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md must hold {begin} and {end} once each, in this order")
    return f"{text[: text.index(begin)]}{begin}\n{content}\n{text[text.index(end) :]}"


def main() -> None:
    """Rewrite or check the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args()
    text = rewritten = arguments.readme.read_text(encoding="utf-8")
    for name in SECTIONS:
        rewritten = rewrite(rewritten, name, section(name))
    if not arguments.check:
        draw_pictures()
        files.write_text(arguments.readme, rewritten)
    elif rewritten != text:
        sys.exit(f"{arguments.readme} is not what the results say: run python benchmarks/report.py")


if __name__ == "__main__":
    main()
