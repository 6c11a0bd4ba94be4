"""MixtureSampler in a plain DataLoader: worker processes, drawing ahead, resume, changes of weights on the way."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from tikmix_fast import MixtureSampler

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a machine with one core
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python 3.12 and newer, threads of torch
]

LENGTHS = [300, 70, 20]
FIRST, SECOND = [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]


def dataset():
    """Concatenate one dataset per domain whose items tell the domain and their number."""
    return ConcatDataset(
        [TensorDataset(torch.full((length,), domain), torch.arange(length)) for domain, length in enumerate(LENGTHS)]
    )


def sampler_(**options):
    return MixtureSampler(LENGTHS, FIRST, seed=5, **options)


def pairs(batches):
    return [item for domain, number in batches for item in zip(domain.tolist(), number.tolist(), strict=True)]


def expected(n, changes=()):
    sampler, data = sampler_(), dataset()
    for at, weights in changes:
        sampler.set_weights(weights, at=at)
    return [(int(domain), int(number)) for domain, number in (data[index] for index in islice(sampler, n))]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_any_number_of_workers_draws_the_same(workers, batch_size):
    loader = DataLoader(dataset(), batch_size=batch_size, sampler=sampler_(), num_workers=workers)
    assert pairs(islice(loader, 96 // batch_size)) == expected(96)


@pytest.mark.parametrize(("drop_last", "many"), [(False, 100), (True, 96)])
def test_a_finite_sampler_gives_the_loader_its_length(drop_last, many):
    loader = DataLoader(dataset(), batch_size=16, sampler=sampler_(num_samples=100), drop_last=drop_last)
    assert len(loader) == -(-many // 16)
    assert pairs(loader) == expected(many)


def test_persistent_workers_go_on_with_what_was_not_drawn():
    sampler = sampler_(num_samples=200)
    loader = DataLoader(dataset(), batch_size=10, sampler=sampler, num_workers=1, persistent_workers=True)
    items = pairs(islice(loader, 20))
    assert items == expected(200)
    sampler.load_state_dict(sampler.state_dict(150))
    assert pairs(loader) == items[150:]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 1)])
def test_a_run_resumed_with_other_workers_draws_what_it_would_have_drawn(before, after):
    sampler = sampler_()
    loader = DataLoader(dataset(), batch_size=4, sampler=sampler, num_workers=before)
    items = pairs(islice(loader, 7))
    if before:
        assert sampler.drawn > 28  # the loader is ahead of the loop
    state = sampler.state_dict(consumed=28)
    resumed = sampler_()
    resumed.load_state_dict(state)
    items += pairs(islice(DataLoader(dataset(), batch_size=4, sampler=resumed, num_workers=after), 10))
    assert items == expected(68)


def test_a_run_resumed_on_more_ranks_draws_what_it_would_have_drawn():
    sampler = sampler_()
    items = pairs(islice(DataLoader(dataset(), batch_size=4, sampler=sampler, num_workers=1), 6))
    parts = []
    for rank in range(2):
        resumed = sampler_(rank=rank, world_size=2)
        resumed.load_state_dict(sampler.state_dict(consumed=24))
        parts.append(pairs(islice(DataLoader(dataset(), batch_size=4, sampler=resumed), 5)))
    items += [item for pair in zip(*parts, strict=True) for item in pair]
    assert items == expected(64)


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_change_in_a_running_loop_at_the_sample_that_was_told(workers):
    sampler = sampler_()
    batches = iter(DataLoader(dataset(), batch_size=4, sampler=sampler, num_workers=workers))
    items = pairs(islice(batches, 5))
    if workers:
        with pytest.raises(ValueError, match=f"smallest possible at is {sampler.drawn}"):
            sampler.set_weights(SECOND, at=20)
    sampler.set_weights(SECOND, at=50)
    state = sampler.state_dict(consumed=20)  # the change to come is part of it
    items += pairs(islice(batches, 20))
    assert items == expected(100, [(50, SECOND)])
    resumed = sampler_()
    resumed.load_state_dict(state)
    assert pairs(islice(DataLoader(dataset(), batch_size=4, sampler=resumed), 20)) == items[20:]
