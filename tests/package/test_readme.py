"""Every Python block of README runs as printed, and README stays short."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"
BLOCKS: list[str] = []
for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL):
    if "import" in block:
        BLOCKS.append(block)
    else:  # goes on from the one before
        BLOCKS[-1] += block
LAST_NAMES = [re.findall(r"^(\w+) = ", block, flags=re.MULTILINE)[-1] for block in BLOCKS]


def test_two_programs_are_shown():
    assert LAST_NAMES == ["run", "influence"]


def test_readme_is_short_and_holds_no_generated_tables():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert ":begin -->" not in text


def test_every_local_link_leads_somewhere():
    text = README.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)[^):]*\)|src=\"([^\":]+)\"", text)
    assert len(targets) > 10
    assert [target for pair in targets for target in pair if target and not (README.parent / target).exists()] == []


@pytest.mark.parametrize("block", BLOCKS, ids=LAST_NAMES)
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    # README's random tokens may have influence that is negative on every domain, which tikmix_d warns of.
    warnings.filterwarnings("ignore", message="task .*: the row's max is", category=UserWarning)
    exec(compile(block, str(README), "exec"), names)
    if "influence" in names:
        assert tuple(names["influence"].shape) == (2, 3)
        assert names["influence"][:, 1].eq(0).all()
        torch.testing.assert_close(names["grad_weight"], names["dy"].T @ names["x"], rtol=1e-4, atol=1e-3)
    if "result" in names:
        matrix = names["matrix"]
        # Each task is served best by the domain whose vocabulary it shares.
        assert matrix["prose", "web"] > matrix["prose", "code"]
        assert matrix["programs", "code"] > matrix["programs", "web"]
        assert names["result"].success
        assert names["result"].as_dict()["noise"] < names["mixture"]["noise"]
        assert names["result"].weights.sum() == pytest.approx(1)
        assert names["check"].max_error < 1e-5
        assert names["run"].measured == 3
        assert names["plan"].every > 2
