"""Several processes measure what one process with all the batches would have measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tikmix_fast import InfluenceEngine, Projection
from tikmix_fast.influence.parallel.ranks import ranks_of

sys.path.insert(0, str(Path(__file__).parent))
import ranks_worker as worker

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not available")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """What every rank wrote down, run by torchrun."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    done = subprocess.run(
        [*command, worker.__file__, str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


def everything(batches):
    return batches


def same(one, other):
    assert one.keys() == other.keys()
    # Projected gradients are summed in float32.
    tolerance = 1e-7 if "stderr_projection" in one else 1e-9
    for part, value in one.items():
        np.testing.assert_allclose(
            other[part], value, rtol=tolerance, atol=tolerance * np.nanmax(np.abs(value)), err_msg=part
        )


@pytest.mark.parametrize(
    ("scenario", "options"),
    [
        ("exact", {}),
        ("uneven", {"micro_batches": 7}),
        ("projected", {"projection": Projection(dim=16, kind="rademacher")}),
    ],
)
def test_matrix_is_that_of_one_process(found, scenario, options):
    """Values, every part of the errors and the record, on every rank."""
    alone = worker.summary(worker.measure(worker.Net(), everything, **options))
    assert np.isfinite(alone["stderr"]).all()
    for rank in found:
        same(alone, rank[scenario])


def test_gradients_are_the_mean_over_ranks(found):
    """DistributedDataParallel averages as usual while influence is measured."""
    model = worker.Net()
    worker.measure(model, everything)
    for rank in found:
        for name, parameter in model.named_parameters():
            mean = parameter.grad / len(found)
            torch.testing.assert_close(
                torch.tensor(rank["gradients"][name], dtype=torch.float64), mean, rtol=1e-9, atol=1e-12
            )


def test_state_is_the_same_everywhere_and_fits_any_number_of_ranks(found):
    assert all(rank["state"] == found[0]["state"] for rank in found)
    alone = worker.measure(worker.Net(), everything, state=found[0]["state"])
    for rank in found:
        same(worker.summary(alone), rank["resumed"])


def test_conservation_is_checked_before_ranks_are_averaged(found):
    for rank in found:
        assert "layer.weight" in rank["hidden"]


_DEATH = """
import os, sys, torch
from datetime import timedelta
from torch import nn
from tikmix_fast import InfluenceEngine
rank = int(sys.argv[2])
torch.distributed.init_process_group(
    "gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2, timeout=timedelta(seconds=20)
)
model = nn.Linear(3, 1)
engine = InfluenceEngine(model, ["web"], ["qa"], preconditioner="identity", process_group=torch.distributed.group.WORLD)
with engine.task("qa"):
    model(torch.ones(2, 3) * (float("nan") if rank and sys.argv[3] == "nan" else 1)).mean().backward()
if rank and sys.argv[3] == "dies":
    os._exit(7)
with engine.domains("web"):
    model(torch.ones(2, 3)).mean().backward()
"""


@pytest.mark.parametrize("how", ["dies", "nan"])
def test_a_rank_that_fails_stops_the_others(how, tmp_path):
    """Within the group's timeout every rank ends with an error."""
    command = [sys.executable, "-c", _DEATH, str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, str(rank), how], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert all(rank.returncode for rank in ranks)
    assert "Error" in errors[0]
    assert how == "dies" or "not finite" in errors[1]


def test_who_measures_together():
    model = nn.Linear(2, 2)
    assert ranks_of(model, "auto", torch.device("cpu")) is None
    assert ranks_of(model, None, torch.device("cpu")) is None
    with pytest.raises(ValueError, match="process_group must be"):
        InfluenceEngine(model, ["web"], ["qa"], preconditioner="identity", process_group="all")
