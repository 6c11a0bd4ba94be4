"""The pages under docs/ build without a warning, and every Python block of theirs runs as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    page.stem: re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for page in sorted(DOCS.glob("*.md"))
}


@pytest.mark.parametrize("page", [page for page, blocks in PAGES.items() if blocks])
def test_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile("".join(PAGES[page]), f"{page}.md", "exec"), names)
    if page == "start":
        matrix, result = names["matrix"], names["result"]
        # Each task is served best by the domain whose vocabulary it shares.
        assert matrix["prose", "web"] > matrix["prose", "code"]
        assert matrix["programs", "code"] > matrix["programs", "web"]
        assert result.success
        assert result.as_dict()["noise"] < names["mixture"]["noise"]
    if page == "kernels":
        assert names["influence"].shape == names["estimate"].shape == names["error"].shape == (2, 3)
        assert ((names["estimate"] - names["influence"]).abs() <= 6 * names["error"]).all()
    if page == "rules":
        assert names["check"].max_error < 1e-5


def test_pages_build(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in ("InfluenceEngine.domains", "InfluenceEngine.verify", "register_rule"):
        assert f'id="tikmix_fast.{name}"' in api


def test_pages_are_linked():
    listed = (DOCS / "index.md").read_text(encoding="utf-8").split()
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= set(listed)
