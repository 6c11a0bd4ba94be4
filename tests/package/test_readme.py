"""Every Python block of README runs as printed."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS: list[str] = []
for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL):
    if "import" in block:
        BLOCKS.append(block)
    else:  # goes on from the one before
        BLOCKS[-1] += block


def test_there_are_blocks():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.findall(r"(\w+) = ", block)[-1])
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    # README's random tokens may have influence that is negative on every domain, which tikmix_d warns of.
    warnings.filterwarnings("ignore", message="task .*: the row's max is", category=UserWarning)
    exec(compile(block, str(README), "exec"), names)
    if "influence" in names:
        import torch

        assert tuple(names["influence"].shape) == (2, 3)
        assert names["influence"][:, 1].eq(0).all()
        torch.testing.assert_close(names["grad_weight"], names["dy"].T @ names["x"], rtol=1e-4, atol=1e-3)
    if "estimate" in names:
        assert names["estimate"].shape == names["error"].shape == (2, 3)
        assert ((names["estimate"] - names["influence"]).abs() <= 6 * names["error"]).all()
    if "result" in names:
        assert names["result"].success
        assert names["result"].weights.sum() == pytest.approx(1)
        assert names["matrix"].shape == (2, 2)
        assert names["run"].measured == 3
        assert names["plan"].every > 2
