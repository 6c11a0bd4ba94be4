"""Under ``fully_shard`` (FSDP2) several processes measure what one process with all the batches would have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not available")

sys.path.insert(0, str(Path(__file__).parent))
if torch.distributed.is_available():
    import sharded_worker as worker

    SCENARIOS = worker.SCENARIOS
else:
    SCENARIOS = {}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """What every rank wrote down, run by torchrun."""
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    done = subprocess.run(
        [*command, worker.__file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ranks = [folder / f"{rank}.json" for rank in range(request.param)]
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(rank.read_text()) for rank in ranks]


def same(alone, other, tolerance=1e-9):
    for part, value in alone.items():
        np.testing.assert_allclose(
            other[part], value, rtol=tolerance, atol=tolerance * np.nanmax(np.abs(value)), err_msg=part
        )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_matrix_and_gradients_are_those_of_one_process(found, scenario):
    """Values, every part of the errors and the record, on every rank; gradients are the mean over ranks."""
    options = {name: value for name, value in SCENARIOS[scenario].items() if name != "share_queries"}
    together = len(found) if scenario.startswith("shared") else 1
    model = worker.Net()
    alone = worker.summary(worker.measure(model, 0, 1, together, **options))
    assert np.isfinite(alone["values"]).all()
    for rank in found:
        same(alone, rank[scenario], 1e-6 if "projected" in scenario else 1e-9)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                torch.tensor(rank[scenario]["gradients"][name], dtype=torch.float64),
                parameter.grad / len(found),
                rtol=1e-9,
                atol=1e-12,
            )


@pytest.mark.parametrize("scenario", ["kept", "checkpointed", "replicated"])
def test_so_do_other_ways_to_shard(found, scenario):
    """Weights kept whole between forward and backward, recomputed activations, replicas of shards."""
    if scenario == "replicated" and len(found) == 2:
        pytest.skip("replicas of shards need four processes")
    alone = worker.summary(worker.measure(worker.Net(), 0, 1))
    for rank in found:
        same(alone, rank[scenario])


def test_mixed_precision_policy(found):
    """Rows and gradients in bfloat16 give the influence of float64 within their rounding."""
    exact = np.array(worker.summary(worker.measure(worker.Net(), 0, 1))["values"])
    for rank in found:
        assert np.abs(np.array(rank["bfloat16"]["values"]) - exact).max() < 0.03 * np.abs(exact).max()


def test_queries_are_shared_by_data_parallel_ranks_too(found):
    alone = worker.summary(worker.measure(worker.Net(), 0, 1, len(found)))
    for rank in found:
        same(alone, rank["parallel, shared"])


def test_a_unit_used_without_its_forward_is_refused(found):
    for rank in found:
        for said in rank["aside"]:
            assert "'blocks.0." in said
            assert "was not captured" in said


def test_shared_queries_take_a_share_of_the_memory(found):
    for rank in found:
        peak, queries = rank["memory, exact"]
        shared_peak, shared_queries = rank["memory, shared"]
        assert shared_queries < 1.2 * queries / len(found)
        assert shared_peak < peak


def test_what_cannot_be_done_is_said(found):
    for rank in found:
        said = rank["refused"]
        assert "task must be the same on every rank" in said["tasks"]
        assert "not finite" in said["nan"]
        assert said["grad"] == "True"
        assert "before sharding" in said["verify"]
        assert "weights changed since" in said["stale"]


def test_micro_batches_that_wait_to_be_reduced_are_kept_apart_from_a_task(found):
    for rank in found:
        without, with_task = rank["waiting"]
        for name, gradient in without.items():
            np.testing.assert_allclose(with_task[name], gradient, rtol=1e-12, atol=1e-15, err_msg=name)
