"""MixtureSampler in torchdata's StatefulDataLoader: its state_dict is all that a resume needs, no adapter."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from torch.utils.data import ConcatDataset, TensorDataset

from tikmix_fast import MixtureSampler

torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 with torch 2.13
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a machine with one core
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python 3.12 and newer, threads of torch
]

LENGTHS = [300, 70, 20]
FIRST, SECOND = [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]


def loader_(workers, batch_size=4, rank=0, world_size=1, **options):
    data = ConcatDataset(
        [TensorDataset(torch.full((length,), domain), torch.arange(length)) for domain, length in enumerate(LENGTHS)]
    )
    sampler = MixtureSampler(LENGTHS, FIRST, 5, rank, world_size, num_samples=options.pop("num_samples", None))
    loader = torchdata.StatefulDataLoader(data, batch_size=batch_size, sampler=sampler, num_workers=workers, **options)
    return sampler, loader


def pairs(batches):
    return [item for domain, number in batches for item in zip(domain.tolist(), number.tolist(), strict=True)]


def expected(n, changes=()):
    sampler, loader = loader_(0)
    for at, weights in changes:
        sampler.set_weights(weights, at=at)
    return [tuple(int(part) for part in loader.dataset[index]) for index in islice(sampler, n)]


@pytest.mark.parametrize("consumed", [1, 7, 12])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2)])
@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_draws_what_it_would_have_drawn(before, after, consumed, every):
    """``every``: torchdata takes its state only so often, and goes over what came later again."""
    sampler, loader = loader_(before, snapshot_every_n_steps=every)
    items = pairs(islice(loader, consumed))
    if before:
        assert sampler.drawn > 4 * consumed  # workers are ahead of the loop
    state = loader.state_dict()
    _, resumed = loader_(after, snapshot_every_n_steps=every)
    resumed.load_state_dict(state)
    items += pairs(islice(resumed, 10))
    assert items == expected(4 * consumed + 40)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_finite_run_ends_where_it_would_have_ended(workers):
    _, loader = loader_(workers, num_samples=50)
    items = pairs(islice(loader, 5))
    _, resumed = loader_(workers, num_samples=50)
    resumed.load_state_dict(loader.state_dict())
    assert items + pairs(resumed) == expected(50)


def test_ranks_resume_together():
    ranks = []
    for rank in range(2):
        _, loader = loader_(2, rank=rank, world_size=2)
        items = pairs(islice(loader, 3))
        _, resumed = loader_(2, rank=rank, world_size=2)
        resumed.load_state_dict(loader.state_dict())
        ranks.append(items + pairs(islice(resumed, 3)))
    assert [item for pair in zip(*ranks, strict=True) for item in pair] == expected(48)


@pytest.mark.parametrize("workers", [0, 2])
def test_new_weights_are_in_the_loaders_state_when_the_loop_has_come_to_them(workers):
    sampler, loader = loader_(workers)
    batches = iter(loader)
    items = pairs(islice(batches, 5))
    sampler.set_weights(SECOND, at=50)
    items += pairs(islice(batches, 10))
    _, resumed = loader_(workers)
    resumed.load_state_dict(loader.state_dict())
    items += pairs(islice(resumed, 10))
    assert items == expected(100, [(50, SECOND)])


@pytest.mark.parametrize("workers", [0, 2])
def test_new_weights_are_in_the_samplers_state_at_once(workers):
    """The loader's own state is older than a change that was told after workers had drawn ahead; the sampler's is not.

    A run that changes weights thus keeps the sampler's state, told what was consumed, and begins with a new loader.
    """
    sampler, loader = loader_(workers)
    batches = iter(loader)
    items = pairs(islice(batches, 5))
    sampler.set_weights(SECOND, at=50)
    state = json.loads(json.dumps(sampler.state_dict(consumed=20)))
    later, resumed = loader_(workers)
    later.load_state_dict(state)
    items += pairs(islice(resumed, 20))
    assert items == expected(100, [(50, SECOND)])
