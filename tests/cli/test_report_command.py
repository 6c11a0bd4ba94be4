"""``tikmix-fast report``: a page that is well formed, loads nothing, and says what the numbers say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from matplotlib import rc_context
from typer.testing import CliRunner

from tikmix_fast import InfluenceMatrix
from tikmix_fast.cli.app import app
from tikmix_fast.demo.results import ArmResult, Boundary, DemoResult
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.matrix.microbatch_record import MicrobatchRecord
from tikmix_fast.mixture.schedule.dynamic import DynamicMixture
from tikmix_fast.report.findings import matrix_warnings
from tikmix_fast.report.page_charts import loss_chart, mixture_chart

EVIL = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "a & b's", "</table></style><style>*{}"]
VOID = {"meta", "img", "br", "link", "input", "hr", "col", "wbr", "base"}


class Page(HTMLParser):
    """What is on a page; raises if a tag is not closed, or closed without being open."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def table(self, *heads: str) -> list[list[str]]:
        return next(table for table in self.tables if tuple(table[0][: len(heads)]) == heads)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def page_of(*arguments: str | Path, out: Path) -> Page:
    result = run(*arguments, "--out", out)
    assert result.exit_code == 0, result.output
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    check(page, text)
    return page


def check(page: Page, text: str) -> None:
    """What holds for every page."""
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "form", "base", "use", "image"}
    for tag, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "href", "xlink:href")}, tag
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import|@font-face", style)
    assert "prefers-color-scheme: dark" in style
    assert "default-src 'none'" in text
    assert dict(page.tags)["html"] == {"lang": "en"}
    assert [tag for tag, _ in page.tags].count("h1") == 1
    levels = [level for level, _ in page.headings]
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    assert all(heading.strip() for _, heading in page.headings)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert not any("url(" in (value or "") for value in attributes.values())
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or (attributes["role"] == "img" and attributes["aria-label"])
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if attributes.get("role") == "group":
            assert attributes["aria-label"]
            assert attributes["tabindex"] == "0"
    for table in page.tables:
        assert len({len(row) for row in table}) == 1


def make(n: int, m: int, seed: int = 0, names: list[str] | None = None) -> InfluenceMatrix:
    random = np.random.default_rng(seed)
    domains = [f"domain {j}" for j in range(m)]
    domains[: len(names or [])] = names or []
    return InfluenceMatrix.from_values(
        random.normal(size=(n, m)), stderr=np.full((n, m), 0.3), tokens=np.full(m, 1e4), domains=domains,
        tasks=[f"task {i}" for i in range(n)],
    )  # fmt: skip


@pytest.fixture
def demo() -> DemoResult:
    domains, tasks = ("web", EVIL[0], "code"), ("qa", EVIL[1])
    settings = DemoSettings(steps=30, stages=3)
    weights = [(0, dict.fromkeys(domains, 1 / 3)), (10, dict(zip(domains, (0.5, 0.2, 0.3), strict=True)))]
    matrix = InfluenceMatrix.from_values([[1.0, -2.0, 0.1]], stderr=[[0.1, 0.1, 0.1]], tasks=["qa"], domains=domains)
    losses = [(10, dict.fromkeys(tasks, 3.0)), (30, dict.fromkeys(tasks, 2.5))]
    return DemoResult(
        settings=settings,
        tikmix=ArmResult(losses, {"qa": 2.0, EVIL[1]: 3.0}, weights),
        uniform=ArmResult(losses, {"qa": 2.5, EVIL[1]: 2.5}, weights[:1]),
        boundaries=[Boundary(10, matrix, weights[1][1], "no solver", False)],
        steered=("qa",),
        held_out=(EVIL[1],),
        sources={"web": EVIL[2]},
        text_bytes=dict.fromkeys(domains, 1000),
        missing={EVIL[3]: "it is not installed"},
        seconds={"training": 12.0},
        rows={"measured": 64},
        environment={"python": "3.11"},
    )


def test_a_matrix_is_shown_with_its_signs_and_significance(tmp_path: Path) -> None:
    matrix = InfluenceMatrix.from_values(
        [[2.0, -4.0, 0.1], [0.2, 1.0, np.nan]], stderr=[[0.1, 0.1, 1.0], [1.0, 0.1, np.nan]], tasks=["qa", "fix"],
        domains=["web", "noise", "books"],
    )  # fmt: skip
    page = page_of(matrix.save(tmp_path / "S.json"), out=tmp_path / "a.html")
    rows = {row[0]: row[1:] for row in page.table("Domain", "qa", "fix")[1:]}
    assert rows["web"][0] == "+0.50★ surely not zero±0.03"
    assert rows["noise"] == ["-1.00★ surely not zero±0.03", "+1.00★ surely not zero±0.10"]
    assert rows["books"] == ["(+0.03)±0.25", "not measured"]
    assert [row[0] for row in page.table("Domain", "qa", "fix")[1:]] == ["web", "noise", "books"]
    assert page.table("Task", "Help", "Harm")[1:] == [["qa", "web", "noise"], ["fix", "noise", "none surely"]]
    assert "3 of 6 influences differ from zero" in page.text
    numbers = {row[0]: row for row in page.table("Domain", "Tokens")[1:]}
    assert numbers["noise"][3] == "-4 ± 0.1"
    assert numbers["books"][4] == "unknown ± unknown"


def test_every_name_is_escaped(demo: DemoResult, tmp_path: Path) -> None:
    matrix = make(2, 4, names=EVIL)
    mixture = {
        "weights": dict.fromkeys(EVIL, 0.25), "prior": [0.25] * 4, "domains": EVIL, "tasks": [EVIL[0]],
        "predicted": [1.0], "predicted_prior": [None], "message": EVIL[1], "warnings": [EVIL[2]], "success": False,
        "settings": {EVIL[0]: {EVIL[3]: EVIL[1]}},
    }  # fmt: skip
    record = {
        "format": "tikmix_fast.influence_run", "settings": {"model": EVIL[0], "domains": {EVIL[1]: EVIL[2]}},
        "seconds": {EVIL[3]: 1.0}, "warnings": EVIL, "memory": EVIL[0],
    }  # fmt: skip
    matrix.save(tmp_path / "S.json")
    (tmp_path / "mix.json").write_text(json.dumps(mixture))
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "demo").mkdir()
    demo.save(tmp_path / "demo" / "results.json")
    page = page_of(tmp_path, "--title", EVIL[1], out=tmp_path / "a.html")
    page_of(tmp_path, "--title", EVIL[1], out=tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    for name in EVIL:
        assert name in page.text
    text = (tmp_path / "a.html").read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert text.count("</style>") == 1


def test_a_training_run_is_shown(demo: DemoResult, tmp_path: Path) -> None:
    demo.save(tmp_path / "results.json")
    make(1, 1).save(tmp_path / "influence.json")  # of a demonstration's folder: not shown twice
    page = page_of(tmp_path, out=tmp_path / "a.html")
    losses = {row[0]: row[1:] for row in page.table("Task", "Group")[1:]}
    assert losses["qa"] == ["steered for", "2.500", "2.000", "-20.0 %, better"]
    assert losses[EVIL[1]] == ["held out", "2.500", "3.000", "+20.0 %, worse"]
    weights = {row[0]: row[1:] for row in page.table("Domain", "step 0")[1:]}
    assert weights["web"] == ["33.3%", "", "50.0%", "+16.7 points"]
    assert "20.0% lower" in page.text
    assert "20.0% higher" in page.text
    assert "At step 10 no mixture was found: no solver" in page.text
    assert ["training", "12.0 s"] in page.table("What", "Cost")
    assert "Influence at step 10" in [text for _, text in page.headings]
    assert sum(text == "Heat map" for _, text in page.headings) == 1


def test_what_mix_wrote_is_shown(tmp_path: Path) -> None:
    matrix = make(2, 3).save(tmp_path / "S.json")
    assert CliRunner().invoke(app, ["mix", str(matrix), "--out", str(tmp_path / "w.json")]).exit_code == 0
    page = page_of(tmp_path / "w.json", out=tmp_path / "a.html")
    written = json.loads((tmp_path / "w.json").read_text())
    shown = {row[0]: row[3] for row in page.table("Domain", "Before")[1:]}
    assert shown == {name: f"{weight:.1%}" for name, weight in written["weights"].items()}
    assert len(page.table("Task", "Before", "After")) == 3


def schedule_of(random: np.random.Generator, names: list[str], boundaries: list[int]) -> DynamicMixture:
    """A schedule that has measured the same influence at every boundary, with noise, and other tasks at the second."""
    warm_up = dict.fromkeys(names, 1 / len(names))
    schedule = DynamicMixture(names, 40, boundaries=boundaries, warm_up=warm_up, options={"diversity": 0.3})
    truth = random.normal(size=(2, len(names)))
    for k, step in enumerate(boundaries):
        record = MicrobatchRecord(2, len(names), blocks=8)
        for _ in range(8):
            tokens = np.full(len(names), 100.0)
            scores = (truth + 0.3 * random.normal(size=truth.shape)) * tokens
            record.add(scores, tokens, scores / 2, np.broadcast_to(tokens / 2, truth.shape))
        matrix = InfluenceMatrix.from_values(
            truth + 0.1 * random.normal(size=truth.shape), stderr=np.full(truth.shape, 0.1), domains=names,
            tasks=["qa", "fix" if k == 1 else EVIL[1]],
        )  # fmt: skip
        schedule.update(step, dataclasses.replace(matrix, record=record))
    return schedule


def test_a_schedule_is_shown(tmp_path: Path) -> None:
    names = ["web", EVIL[0], "code", "books"]
    schedule = schedule_of(np.random.default_rng(0), names, [10, 20, 30])
    schedule.save(tmp_path / "schedule.json")
    page = page_of(tmp_path, out=tmp_path / "a.html")
    first, _, last = schedule.history
    assert "measured at 3 of them so far, and the mixture changed at 3" in page.text
    weights = {row[0]: row for row in page.table("Domain", "step 0", "Course", "step 30")[1:]}
    assert {name: row[3] for name, row in weights.items()} == {k: f"{v:.1%}" for k, v in last.weights.items()}
    assert {row[1] for row in weights.values()} == {"25.0%"}
    (chart,) = [each for _, each in page.tags if each.get("aria-label", "").startswith("Weights of the domains")]
    assert chart["role"] == "img"
    decisions = page.table("At", "Decision")
    assert decisions[1] == ["step 10", f"{first.reason}."]
    assert len(decisions) == 4
    ranks = {row[0]: row[1:] for row in page.table("Task", "step 20", "step 30")[1:]}
    assert list(ranks) == ["qa", "mean"]  # the only task that was measured twice in a row
    assert last.ranks is not None
    (spearman,), (kendall,), (ceiling,) = last.ranks.spearman, last.ranks.kendall, last.ranks.ceiling
    assert ranks["qa"][1] == f"{spearman:.2f} ({kendall:.2f})at most {ceiling:.2f}"
    assert ranks["mean"] == ranks["qa"]


def test_a_schedule_shows_what_it_has_so_far(tmp_path: Path) -> None:
    """Nothing decided yet; one decision, at step 0, so that there is no warm-up; a solver that failed."""
    random = np.random.default_rng(1)
    DynamicMixture(["a", "b"], 10).save(tmp_path / "new.json")
    page = page_of(tmp_path / "new.json", out=tmp_path / "new.html")
    assert "measured at 0 of them" in page.text
    assert page.table("Domain", "step 0", "Course", "step 0")[1][1] == "50.0%"
    one = schedule_of(random, ["a", "b", "c"], [0])
    one.save(tmp_path / "one.json")
    page = page_of(tmp_path / "one.json", out=tmp_path / "one.html")
    shown = {row[0]: row[1] for row in page.table("Domain", "step 0")[1:]}
    assert shown == {name: f"{weight:.1%}" for name, weight in one.weights.items()}
    assert "Did the ranks stay?" not in [text for _, text in page.headings]
    state = one.state_dict()
    state["history"][0] |= {
        "success": False, "message": "no way", "changed": False, "weights": state["warm_up"], "warnings": ["too little"]
    }  # fmt: skip
    (tmp_path / "failed.json").write_text(json.dumps(state))
    page = page_of(tmp_path / "failed.json", out=tmp_path / "failed.html")
    assert "At step 0: no mixture was found: no way" in page.text
    assert "At step 0: too little" in page.text


@pytest.mark.parametrize(("n", "m"), [(1, 1), (20, 100), (3, 26)])
def test_every_size_is_shown_whole(n: int, m: int, tmp_path: Path) -> None:
    page = page_of(make(n, m).save(tmp_path / "S.json"), out=tmp_path / "a.html")
    heat = page.table("Domain", "task 0")
    assert (len(heat), len(heat[0])) == (m + 1, n + 1)
    assert ("±" in heat[1][1]) == (n * m <= 200)
    assert (tmp_path / "a.html").stat().st_size < 2_000_000


def test_nothing_measured_and_no_errors_are_said(tmp_path: Path) -> None:
    nothing = InfluenceMatrix.from_values(np.full((2, 2), np.nan))
    page = page_of(nothing.save(tmp_path / "S.json"), out=tmp_path / "a.html")
    assert "Never measured: domain0, domain1" in page.text
    assert matrix_warnings(InfluenceMatrix.from_values([[1.0, 2.0]])) == [
        "There are no error bars: nothing here tells influence from noise."
    ]


def test_warnings_of_a_matrix_are_in_words() -> None:
    assert matrix_warnings(InfluenceMatrix.from_values([[1.0, 2.0]], stderr=[[0.01, 0.01]])) == []
    noisy = InfluenceMatrix.from_values([[1.0, 2.0], [0.0, 9.0]], stderr=[[0.5, 0.5], [0.1, 0.1]], tasks=["qa", "fix"])
    share = noisy.relative_error()[0] ** 2
    assert matrix_warnings(noisy) == [
        f"Noise is a large part of what tells domains apart for: qa ({share:.0%}). Measure more tokens."
    ]
    more = dataclasses.replace(
        noisy, dropped=3, microbatches=np.array([3, 9]), settings={"excluded": ["a", "b", "c", "d"]}
    )
    text = " ".join(matrix_warnings(more))
    for part in ("3 micro-batches were dropped", "rough: domain0.", "a, b, c and 1 more"):
        assert part in text


def corners(path: str) -> list[tuple[float, float]]:
    """The points of a path, in pixels; y grows downwards."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path)]


def test_charts_draw_the_numbers() -> None:
    chart = mixture_chart([(0, {"a": 0.25, "b": 0.75}), (50, {"a": 1.0, "b": 0.0})], 100, "mix")
    band = corners(re.findall(r'd="([^"]*)" style="fill: var\(--c0\)', chart)[0])
    bottom, left, right = max(y for _, y in band), min(x for x, _ in band), max(x for x, _ in band)
    height = bottom - min(y for _, y in band)
    assert height == pytest.approx(4 * (bottom - band[1][1]), abs=0.5)  # a quarter, then all of the height
    assert sorted({x for x, _ in band}) == pytest.approx([left, (left + right) / 2, right], abs=0.2)
    many = {f"d{k}": 0.01 for k in range(20)} | {"big": 0.8}
    assert len(re.findall(r"fill: var\(--c\d\)", mixture_chart([(0, many)], 10, "mix"))) == 9
    assert "others" in mixture_chart([(0, many)], 10, "mix")
    lines = {"one": [(5, 2.0), (10, 1.0)], "two": [(5, 2.0), (10, 1.5)]}
    curves = re.findall(r'd="([^"]*)" style="([^"]*stroke: var\(--l\d\)[^"]*)"', loss_chart(lines, "losses"))
    (solid, _), (dashed, looks) = curves
    assert "stroke-dasharray" in looks
    ((_, high), (_, low)), ((_, same), (_, middle)) = corners(solid), corners(dashed)
    assert high == same
    assert middle == pytest.approx((high + low) / 2, abs=0.01)
    assert loss_chart({"one": [(5, 2.0)]}, "flat").count("var(--l0)") == 1
    assert loss_chart({"none": []}, "empty") == ""


def test_charts_show_names_as_they_are_and_do_not_depend_on_the_users_settings() -> None:
    """No name is markup, mathematics or a colour; one that no font or no XML has does not stop the page."""
    names = [*EVIL, "$\\nothing$", "#000001", "字", "two\nlines", "\x01"]
    weights = [(0, dict.fromkeys(names, 1 / len(names)))]
    chart = mixture_chart(weights, 10, "mix")
    shown = [text for text in Page(chart).words if text.strip()]
    expected = [name if len(name) <= 16 else f"{name[:15]}…" for name in names[:7]] + ["two\ufffdlines", "\ufffd"]
    assert [text for text in shown if text in expected] == expected
    with rc_context({"axes.grid": True, "font.size": 30, "svg.fonttype": "path"}):
        assert mixture_chart(weights, 10, "mix") == chart
    assert not re.search(r'style="[^"]*#', chart)  # every colour follows the page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "not an influence matrix"),
        ('{"format": "tikmix_fast.influence_matrix", "version": 1}', "lacks"),
        ('{"format": "tikmix_fast.demo", "version": 1}', "lacks"),
        ('{"format": "tikmix_fast.influence_run", "settings": 1}', "'settings' must be a dict"),
        ('{"format": "tikmix_fast.dynamic_mixture", "version": 1}', "'domains' must be a list"),
        (
            '{"format": "tikmix_fast.dynamic_mixture", "version": 1, "domains": ["a"], "steps": 4, "boundaries": [2],'
            ' "warm_up": {"a": 1.0}, "history": [{}]}',
            "history of the state",
        ),
        ('{"weights": [], "prior": [], "predicted": [], "message": ""}', "must be"),
        (None, "No such file"),
    ],
)
def test_mistakes_are_told_in_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "S.json"
    if content is not None:
        path.write_text(content)
    result = run(path, "--out", tmp_path / "a.html")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert message in line
    assert "S.json" in line
    assert not (tmp_path / "a.html").exists()


def test_an_empty_folder_is_a_mistake_and_foreign_files_in_folders_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    result = run(tmp_path)
    assert result.exit_code == 2
    assert f"none in {tmp_path}" in result.stderr.replace("\n", "")
    make(2, 2).save(tmp_path / "S.json")
    found = run(tmp_path, "--out", tmp_path / "a.html", "--json")
    counts: dict[str, Any] = json.loads(found.stdout)
    assert counts == {
        "file": str(tmp_path / "a.html"), "measurements": 0, "matrices": 1, "mixtures": 0, "schedules": 0,
        "training runs": 0,
    }  # fmt: skip


def test_chromium_shows_it(demo: DemoResult, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    demo.save(tmp_path / "results.json")
    page_of(tmp_path, out=tmp_path / "a.html")
    words = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*words, "--virtual-time-budget=1000", "--dump-dom", f"file://{tmp_path / 'a.html'}"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = Page(re.sub(r"^<!DOCTYPE html>", "", done.stdout))
    written = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert shown.tables == written.tables  # the browser understood it as it was meant
    assert "Content Security Policy" not in done.stderr
