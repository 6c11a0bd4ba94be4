"""Write what was measured into the pages under docs/, between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.

python -m benchmarks.report             # rewrite the pages, draw the roofline
python -m benchmarks.report --check     # change nothing

README holds a few numbers in sentences of its own. They are compared with the results and never rewritten. The exit
status is 1 if one of them is wrong, or if ``--check`` finds a page that is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python benchmarks/report.py` works too

from benchmarks.gpu.tables import gpu_bars, gpu_facts, gpu_tables  # noqa: E402
from benchmarks.tables import ops_summary, suite_tables  # noqa: E402
from tikmix_fast import files  # noqa: E402
from tikmix_fast.report.benchmark_tables import (  # noqa: E402
    TextTable,
    benchmark_facts,
    bytes_text,
    main_rows,
)


def demo_cells(results: dict[str, Any], tasks: Sequence[str]) -> tuple[str, str, str]:
    """Return the mean loss of ``tasks`` on the uniform mixture and under TiKMiX-D, and its change, over seeds."""
    seeds = results["seeds"]
    theirs, ours = (
        np.array([[each[arm][task] for task in tasks] for each in seeds]).mean(1) for arm in ("uniform", "tikmix")
    )
    change = 100 * (ours / theirs - 1)
    spread = f" ± {change.std(ddof=1):.1f}" if len(seeds) > 1 else ""
    return f"{theirs.mean():.3f}", f"{ours.mean():.3f}", f"{change.mean():+.1f} %{spread}"


def demo_table(results: dict[str, Any]) -> str:
    """Return the table of the demonstration: every task's loss in both arms, and how it was measured."""
    seeds = results["seeds"]

    def row(title: str, tasks: Sequence[str]) -> str:
        return f"| {' | '.join([title, *demo_cells(results, tasks)])} |"

    lines = ["| task | uniform | TiKMiX-D | change |", "|---|---:|---:|---:|"]
    for group, tasks in (("steered for", results["steered"]), ("held out", results["held_out"])):
        lines += [row(f"{task} ({group}: {results['sources'][task]})", [task]) for task in tasks]
        lines.append(row(f"**mean, {group}**", tasks))
    machine, packages = results["environment"]["machine"], results["environment"]["packages"]
    minutes = np.mean([each["wall_seconds"] for each in seeds]) / 60
    share = np.mean([each["seconds"]["measuring"] / sum(each["seconds"].values()) for each in seeds])
    commit = (results["environment"]["commit"] or "unknown").split()
    facts = (
        "Losses are in nats per byte, on text that was neither trained on nor measured. They are means over seeds "
        f"{', '.join(str(each['seed']) for each in seeds)}; the change has its standard deviation",
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
            "Times are those of influence and total gradient together, over that of the plain weight gradient alone, "
            "`grad_output.T @ input`, with the 95 % interval. Extra memory is the growth of the process at the peak of "
            "a call, without the total. The error is max over cells of |dS_ij| / (|q_i| |g_j|) against float64. "
            f"The roofs are the fastest products and the fastest copy of the same run: {_roofs(results['rates'])}.",
            "![Operations per second of each case under the measured roofs](../benchmarks/results/roofline.png)",
            _folded("Every method, case by case", suite_tables(results)),
            f"{benchmark_facts(results)}.",
        ]
    )


def _roofs(rates: dict[str, Any]) -> str:
    products = [f"{name} {peak / 1e9:.0f} GF/s ({rates['found_by'][name]})" for name, peak in rates["flops"].items()]
    return f"{', '.join(products)}, copy {rates['bandwidth'] / 1e9:.0f} GB/s"


def choice_section(results: dict[str, Any]) -> str:
    """Return the ways to group influence on a grid of shapes, folded."""
    folded = _folded("Which way is taken, by counting, and what each takes", suite_tables(results))
    return f"{folded}\n\nCPU time; {benchmark_facts(results)}."


def tables_section(*results: dict[str, Any]) -> str:
    """Return every table of the results, each under its title."""
    parts = [f"**{table.title}**\n\n{table.to_markdown()}" for each in results for table in suite_tables(each)]
    return "\n\n".join([*parts, *dict.fromkeys(f"{benchmark_facts(each)}." for each in results)])


def _folded(title: str, tables: list[TextTable]) -> str:
    inner = "\n\n".join(f"**{table.title}**\n\n{table.to_markdown()}" for table in tables)
    return f"<details><summary>{title}</summary>\n\n{inner}\n\n</details>"


def gpu_section(*results: dict[str, Any]) -> str:
    """Return the goals and the machine of every GPU, newest first, with all else folded; or that there are none."""
    if not results:
        return "No results on a GPU yet: `python -m benchmarks.gpu` makes them on a machine with one."
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
        "The losses are changes of the mean from the uniform mixture at equal tokens, paired by seed, with 95 % t "
        "intervals. *Noise* and *fragments* are the weights of these domains at the end; 1 is their uniform weight. "
        f"{tokens / 1e6:.1f} million bytes per arm; "
        f"{environment['machine']['processor']}, torch {environment['packages']['torch']}, commit "
        f"{environment['commit'][:10]}, {environment['date']}."
    )


def cost_facts(ops: dict[str, Any], engine: dict[str, Any], mixture: dict[str, Any]) -> list[str]:
    """Return what README's table of costs says."""
    full, half = (main_rows(case) for case in ops["cases"][:2])
    steps = [_ratio(case, "with exact influence") for case in engine["steps"][:2]]
    plain, others = engine["measurements"][:2]
    with_others = [_ratio(others, name) for name in ("a backward per domain, mixed", "opacus, grad_sample")]
    weighed = [row for row in engine["memory"]["rows"] if row["method"] == "tikmix_fast"]
    few, many = weighed[0], weighed[-1]
    solved = [_row(case, "auto")["seconds"] * 1e3 for case in mixture["cases"][:2]]
    return [
        f"float32 {full[0]['ratio']:.2f}, bfloat16 {half[0]['ratio']:.2f} "
        f"(fastest other way: {full[1]['ratio']:.2f}, {half[1]['ratio']:.2f})",
        f"float32 {steps[0]}, bfloat16 {steps[1]}",
        f"{_ratio(plain, 'tikmix_fast')} (a backward pass per domain: {with_others[0]}, Opacus: {with_others[1]})",
        f"{bytes_text(few['above_floor_bytes'])} for {few['domains']} domains, "
        f"{bytes_text(many['above_floor_bytes'])} for {many['domains']}",
        f"{solved[0]:.0f} ms, {solved[1]:.0f} ms",
    ]


def demo_facts(results: dict[str, Any]) -> list[str]:
    """Return what README says of the demonstration: the tasks steered for, those held out, and the worst of these."""
    _, _, held_out = demo_cells(results, results["held_out"])
    changes = [demo_cells(results, [task])[2] for task in results["held_out"]]
    worst = max(changes, key=lambda change: float(change.split()[0]))
    return [" | ".join(demo_cells(results, results["steered"])), held_out, worst]


def study_facts(summary: dict[str, Any]) -> list[str]:
    """Return what README says of the study: arms' steered and held-out losses against the uniform mixture."""
    from benchmarks.study.report import REFERENCE, changes, collect, steered_and_held_out  # with the arms, and so torch

    arms = collect(summary["results"], "summary.json")
    return [
        ", ".join(f"{changes(arms, arm, REFERENCE, tasks).mean():+.1%}" for tasks in steered_and_held_out(arms))
        for arm in ("half and half", "tikmix-d", "tikmix-d in-run")
    ]


def gpu_status(*results: dict[str, Any]) -> list[str]:
    """Return what README says of GPUs."""
    if not results:
        return ["not yet run on a GPU"]
    return [f"measured on {name}" for name in sorted({result["device"]["name"] for result in results})]


def _row(case: dict[str, Any], method: str) -> dict[str, Any]:
    row: dict[str, Any] = next(row for row in case["rows"] if row["method"] == method)
    return row


def _ratio(case: dict[str, Any], method: str) -> str:
    return f"{_row(case, method)['ratio']:.2f}"


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
PAGES = {"docs/study.md": ("demo", "study"), "docs/benchmarks.md": ("ops", "choice", "engine", "mixture", "gpu")}
README_FACTS: tuple[tuple[tuple[str, ...], Callable[..., list[str]]], ...] = (
    (("ops.json", "engine.json", "mixture.json"), cost_facts),
    (("demo.json",), demo_facts),
    (("study/summary.json",), study_facts),
    (("gpu-*.json",), gpu_status),
)


def read_results(names: Sequence[str]) -> list[dict[str, Any]]:
    """Read the named results. A pattern stands for as many as there are, also none.

    Raises
    ------
    FileNotFoundError
        If a named file does not exist.
    """
    folder = ROOT / RESULTS
    paths = sorted(folder.glob(names[0])) if "*" in names[0] else [folder / name for name in names]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"No results yet: `python -m benchmarks.run` makes {' and '.join(missing)}.")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def section(name: str) -> str:
    """Return what belongs between the marks of ``name``: a sentence where there are no results yet."""
    names, make = SECTIONS[name]
    try:
        return make(*read_results(names))
    except FileNotFoundError as error:
        return str(error)


def draw_pictures() -> None:
    """Draw the pictures that are made of results alone."""
    from tikmix_fast.report.pictures import save_figure
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
        raise ValueError(f"the page must hold {begin} and {end} once each, in this order")
    return f"{text[: text.index(begin)]}{begin}\n{content}\n{text[text.index(end) :]}"


def missing_facts(readme: str) -> list[str]:
    """Return what the results say and ``readme`` does not. Line breaks do not matter."""
    words = " ".join(readme.split())
    return [fact for names, make in README_FACTS for fact in make(*read_results(names)) if fact not in words]


def main() -> None:
    """Rewrite the pages or check them, and check README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    faults = []
    for page, names in PAGES.items():
        text = rewritten = (ROOT / page).read_text(encoding="utf-8")
        for name in names:
            rewritten = rewrite(rewritten, name, section(name))
        if not check:
            files.write_text(ROOT / page, rewritten)
        elif rewritten != text:
            faults.append(f"{page} is not what the results say: run python -m benchmarks.report")
    if not check:
        draw_pictures()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    faults += [f"README.md must say: {fact}" for fact in missing_facts(readme)]
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
