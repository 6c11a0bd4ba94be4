"""MixtureSampler: proportions, epochs, changes of weights, ranks, state; the stream as users see it."""

from __future__ import annotations

import copy
import json
import pickle
import tracemalloc
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tikmix_fast import MixtureSampler

LENGTHS = [700, 90, 11, 3000]
FIRST, SECOND, THIRD = [0.4, 0.3, 0.2, 0.1], [0.05, 0.9, 0.0, 0.05], [0.25, 0.25, 0.25, 0.25]


def take(sampler, n):
    return list(islice(iter(sampler), n))


def domains_of(indices, lengths=LENGTHS):
    return np.searchsorted(np.cumsum(lengths), indices, side="right")


def uninterrupted(n, changes=(), lengths=LENGTHS, weights=FIRST, seed=3):
    """Draw n samples in one process that knows every change of weights from the start."""
    sampler = MixtureSampler(lengths, weights, seed=seed)
    for at, new in changes:
        sampler.set_weights(new, at=at)
    return take(sampler, n)


def assert_every_epoch_is_complete(indices, lengths=LENGTHS):
    domains = domains_of(indices, lengths)
    offset = np.cumsum(lengths) - lengths
    for domain, length in enumerate(lengths):
        items = np.asarray(indices)[domains == domain] - offset[domain]
        for start in range(0, len(items), length):
            epoch = items[start : start + length]
            assert len(np.unique(epoch)) == len(epoch)
            assert epoch.min() >= 0
            assert epoch.max() < length


# Proportions and epochs


def test_proportions_hold_at_every_prefix_since_each_change():
    changes = [(5_000, SECOND), (5_003, THIRD), (30_000, FIRST)]
    drawn = domains_of(uninterrupted(60_000, changes))
    for (start, weights), end in zip([(0, FIRST), *changes], [5_000, 5_003, 30_000, 60_000], strict=True):
        prefixes = np.arange(1, end - start + 1)
        for domain, weight in enumerate(weights):
            assert np.abs(np.cumsum(drawn[start:end] == domain) - weight * prefixes).max() < 1


def test_each_domain_is_used_up_before_it_repeats_also_across_changes():
    indices = uninterrupted(40_000, [(1_000, SECOND), (20_001, THIRD)])
    assert_every_epoch_is_complete(indices)
    small = np.asarray(indices)[domains_of(indices) == 2]  # 11 items, hundreds of epochs
    assert set(small[:11]) == set(range(790, 801))
    assert len({tuple(small[start : start + 11]) for start in range(0, 1100, 11)}) == 100  # each in another order


def test_counts_and_epochs_are_those_of_what_was_drawn():
    sampler = MixtureSampler(LENGTHS, FIRST, seed=3)
    indices = take(sampler, 20_000)
    counts = np.bincount(domains_of(indices), minlength=4)
    assert sampler.drawn == 20_000
    assert np.array_equal(sampler.counts, counts)
    assert np.array_equal(sampler.epochs, counts // LENGTHS)
    for consumed in (0, 1, 5_000, 16_384, 16_385, 20_000):
        assert np.array_equal(sampler.counts_at(consumed), np.bincount(domains_of(indices[:consumed]), minlength=4))


def test_another_seed_draws_other_items_in_another_order():
    one, other = uninterrupted(1000, seed=3), uninterrupted(1000, seed=4)
    assert np.mean(np.equal(one, other)) < 0.1
    assert np.mean(domains_of(one) == domains_of(other)) < 0.6
    assert one == uninterrupted(1000, seed=3)


def test_one_domain_and_one_item_work():
    assert take(MixtureSampler([1], [1.0]), 5) == [0] * 5
    assert sorted(take(MixtureSampler([7], [1.0]), 7)) == list(range(7))
    assert set(take(MixtureSampler([0, 2, 0], [0.0, 1.0, 0.0]), 10)) == {0, 1}


def test_memory_does_not_grow_with_the_domains_or_the_draws():
    tracemalloc.start()
    sampler = MixtureSampler([10**12] * 64, np.ones(64) / 64, lookback=0)
    take(sampler, 20_000)
    before, _ = tracemalloc.get_traced_memory()
    for _ in islice(sampler, 60_000):
        pass
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after < before + 200_000
    assert peak < 20_000_000


def test_domains_of_one_length_have_orders_of_their_own():
    domains = np.array(take(MixtureSampler([50, 50], [0.5, 0.5], seed=3), 100))
    first, second = domains[domains < 50], domains[domains >= 50] - 50
    assert sorted(first) == sorted(second) == list(range(50))
    assert np.mean(first == second) < 0.2


# Changing weights


def test_weights_set_while_drawing_give_the_stream_of_weights_set_before():
    sampler = MixtureSampler(LENGTHS, FIRST, seed=3)
    iterator = iter(sampler)
    drawn = list(islice(iterator, 17_000))
    sampler.set_weights(SECOND)  # at 17000
    drawn += islice(iterator, 100)
    sampler.set_weights(FIRST, at=40_000)
    sampler.set_weights(THIRD, at=17_200)
    drawn += islice(iterator, 33_000)
    assert drawn == uninterrupted(50_100, [(17_000, SECOND), (17_200, THIRD), (40_000, FIRST)])


def test_named_weights_go_to_the_domains_of_their_names():
    sampler = MixtureSampler({"web": 5, "code": 5}, {"code": 1.0, "web": 0.0})
    sampler.set_weights({"code": 0.0, "web": 1.0}, at=4)
    assert sampler.domains == ("web", "code")
    assert domains_of(take(sampler, 8), [5, 5]).tolist() == [1] * 4 + [0] * 4


def test_the_weights_hold_from_at_on():
    sampler = MixtureSampler([5, 5], [1.0, 0.0])
    sampler.set_weights([0.0, 1.0], at=4)
    assert sampler.weights.tolist() == [1.0, 0.0]
    assert domains_of(take(sampler, 8), [5, 5]).tolist() == [0] * 4 + [1] * 4
    assert sampler.weights.tolist() == [0.0, 1.0]


def test_the_last_change_for_the_same_sample_wins_and_the_first_sample_can_change():
    sampler = MixtureSampler(LENGTHS, FIRST, seed=3)
    sampler.set_weights(SECOND)
    sampler.set_weights(THIRD)
    sampler.set_weights(FIRST, at=100)
    sampler.set_weights(SECOND, at=100)
    assert take(sampler, 300) == uninterrupted(300, [(100, SECOND)], weights=THIRD)


@pytest.mark.parametrize("at", [0, 100])
def test_counts_that_were_read_do_not_delay_a_change(at):
    sampler = MixtureSampler(LENGTHS, FIRST, seed=3)
    take(sampler, at)
    sampler.set_weights(SECOND)
    assert sampler.counts.sum() == at  # plans the draws from here on
    sampler.set_weights(THIRD)
    drawn = np.bincount(domains_of(take(sampler, 500)), minlength=4)
    assert drawn.tolist() == [125, 125, 125, 125]


def test_a_change_behind_what_was_drawn_is_refused_and_says_the_earliest():
    sampler = MixtureSampler(LENGTHS, FIRST, seed=3, rank=1, world_size=4)
    take(sampler, 10)
    assert sampler.drawn == 40
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=r"got 39.*smallest possible at is 40"):
        sampler.set_weights(SECOND, at=39)
    assert sampler.state_dict() == before
    sampler.set_weights(SECOND, at=40)
    assert sampler.state_dict()["origin"]["at"] == 40


def test_a_change_far_ahead_costs_nothing_now():
    sampler = MixtureSampler(LENGTHS, FIRST, seed=3)
    sampler.set_weights(SECOND, at=10**15)
    assert take(sampler, 100) == uninterrupted(100)
    assert sampler.state_dict()["changes"] == [{"at": 10**15, "weights": SECOND}]


# Ranks


@pytest.mark.parametrize("world_size", [2, 3, 16])
def test_ranks_are_disjoint_and_their_union_is_the_stream_of_one_process(world_size):
    changes = [(1_001, SECOND), (20_000, THIRD)]
    rounds = -(-40_000 // world_size)
    table = np.empty((rounds, world_size), dtype=int)
    for rank in range(world_size):
        sampler = MixtureSampler(LENGTHS, FIRST, seed=3, rank=rank, world_size=world_size)
        for at, weights in changes:
            sampler.set_weights(weights, at=at)
        table[:, rank] = take(sampler, rounds)
        assert sampler.drawn == rounds * world_size
        assert sampler.counts.sum() == sampler.drawn
    assert table.ravel().tolist() == uninterrupted(rounds * world_size, changes)


def test_ranks_that_change_in_step_agree_without_naming_the_sample():
    samplers = [MixtureSampler(LENGTHS, FIRST, seed=3, rank=rank, world_size=3) for rank in range(3)]
    rows = [take(sampler, 50) for sampler in samplers]
    for sampler in samplers:
        sampler.set_weights(SECOND)
    rows = [row + take(sampler, 50) for row, sampler in zip(rows, samplers, strict=True)]
    assert np.transpose(rows).ravel().tolist() == uninterrupted(300, [(150, SECOND)])


# State


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_runs_interrupted_anywhere_draw_what_an_uninterrupted_run_draws(data):
    """Draw, change weights, save a state behind what was drawn, resume with other ranks; many times over."""
    whole = st.integers
    mixture = st.sampled_from([FIRST, SECOND, THIRD, [1.0, 0.0, 0.0, 0.0]])
    changes, stream, consumed, state = {}, [], 0, None
    for _ in range(data.draw(whole(1, 4))):
        world_size = data.draw(whole(1, 5))
        samplers = [
            MixtureSampler(LENGTHS, FIRST, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        if state is not None:
            for sampler in samplers:
                sampler.load_state_dict(json.loads(json.dumps(state)))
        rows = [[] for _ in samplers]
        for _ in range(data.draw(whole(0, 3))):
            steps = data.draw(st.one_of(whole(0, 40), whole(4_000, 20_000))) // world_size
            ahead = data.draw(st.one_of(st.none(), whole(0, 20_000)))
            weights = data.draw(mixture)
            for row, sampler in zip(rows, samplers, strict=True):
                row += take(sampler, steps)
                at = sampler.drawn if ahead is None else sampler.drawn + ahead
                sampler.set_weights(weights, at=None if ahead is None else at)
            changes[at] = weights
        for row, sampler in zip(rows, samplers, strict=True):
            row += take(sampler, 5)
        drawn = samplers[0].drawn
        # Rank r has the samples g with g % world_size == r, from the consumed ones on.
        first = {rank: consumed + (rank - consumed) % world_size for rank in range(world_size)}
        by_number = {first[rank] + world_size * i: x for rank, row in enumerate(rows) for i, x in enumerate(row)}
        assert sorted(by_number) == list(range(consumed, drawn))
        stop = data.draw(whole(consumed, drawn))
        states = [sampler.state_dict(stop) for sampler in samplers]
        assert all(other == states[0] for other in states)
        stream += [by_number[g] for g in range(consumed, stop)]
        state, consumed = states[0], stop
    assert stream == uninterrupted(len(stream), sorted(changes.items()))
    assert_every_epoch_is_complete(stream)


def test_a_state_keeps_the_changes_ahead():
    sampler = MixtureSampler(LENGTHS, FIRST, seed=3)
    sampler.set_weights(SECOND, at=200)
    take(sampler, 100)
    resumed = MixtureSampler(LENGTHS, FIRST, seed=3)
    resumed.load_state_dict(sampler.state_dict())
    assert take(resumed, 200) == uninterrupted(300, [(200, SECOND)])[100:]


def test_the_state_is_small_plain_json():
    sampler = MixtureSampler({"web": 10**9, "code": 10**8}, {"code": 0.25, "web": 0.75}, seed=2**64 - 1)
    for _ in range(5):
        take(sampler, 10_000)
        sampler.set_weights([0.5, 0.5])
    state = sampler.state_dict(49_999)
    assert state["version"] == 1
    assert state["domains"] == ["web", "code"]
    assert [change["at"] for change in state["changes"]] == [50_000]
    text = json.dumps(state, allow_nan=False)
    assert len(text) < 1000
    assert json.loads(text) == state


def test_the_state_does_not_depend_on_what_was_drawn_ahead():
    near, far = (MixtureSampler(LENGTHS, FIRST, seed=3) for _ in range(2))
    take(near, 100)
    take(far, 50_000)
    assert near.state_dict(100) == far.state_dict(100) == near.state_dict()


def test_loading_rewinds_running_iterators():
    sampler = MixtureSampler(LENGTHS, FIRST, seed=3)
    iterator = iter(sampler)
    drawn = list(islice(iterator, 1000))
    sampler.load_state_dict(sampler.state_dict(600))
    assert list(islice(iterator, 400)) == drawn[600:]


def test_lookback_limits_how_far_a_state_goes_back():
    sampler = MixtureSampler(LENGTHS, FIRST, seed=3, lookback=20_000)
    take(sampler, 100_000)
    assert sampler.state_dict(80_000)["consumed"] == 80_000
    with pytest.raises(ValueError, match="longer lookback"):
        sampler.state_dict(40_000)
    with pytest.raises(ValueError, match="at most the 100000 global samples"):
        sampler.state_dict(100_001)


def test_a_pickled_sampler_goes_on_where_it_was():
    sampler = MixtureSampler(LENGTHS, FIRST, seed=3)
    sampler.set_weights(SECOND, at=150)
    take(sampler, 100)
    clone = pickle.loads(pickle.dumps(sampler))
    assert take(clone, 100) == take(sampler, 100)


# Length and iterators


@pytest.mark.parametrize(("num_samples", "world_size"), [(0, 1), (10, 1), (40_000, 1), (10, 3), (10, 16), (40_001, 4)])
def test_num_samples_ends_the_stream_of_all_ranks(num_samples, world_size):
    draws = []
    for rank in range(world_size):
        sampler = MixtureSampler(LENGTHS, FIRST, seed=3, rank=rank, world_size=world_size, num_samples=num_samples)
        many = len(sampler)
        row = list(sampler)
        assert many == len(row) == len(range(rank, num_samples, world_size))
        assert len(sampler) == 0
        assert list(sampler) == []
        assert sampler.drawn == min(num_samples, len(row) * world_size)
        draws += zip(range(rank, num_samples, world_size), row, strict=True)
    assert [index for _, index in sorted(draws)] == uninterrupted(num_samples)


def test_a_new_iterator_continues_and_iterators_share_their_place():
    sampler = MixtureSampler(LENGTHS, FIRST, seed=3, num_samples=30)
    first, second = iter(sampler), iter(sampler)
    assert [*islice(first, 10), *islice(second, 10), *first] == uninterrupted(30)
    with pytest.raises(StopIteration):
        next(second)


def test_an_endless_sampler_has_no_length():
    with pytest.raises(TypeError, match=r"endless.*num_samples"):
        len(MixtureSampler([1], [1.0]))


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], []), ValueError, "lengths must have 1 to 65536 domains; got 0"),
        (([3, -1], [0.5, 0.5]), ValueError, "lengths must be an int from 0 to"),
        (([2**53] * 1000, [0.001] * 1000), ValueError, "lengths must sum to at most"),
        (([3, True], [0.5, 0.5]), ValueError, "lengths must be an int from 0 to .*; got True"),
        (([3, 2.0], [0.5, 0.5]), ValueError, "lengths must be an int from 0 to .*; got 2.0"),
        ((5, [1.0]), TypeError, "lengths must be a sequence or mapping"),
        (({1: 5}, [1.0]), TypeError, "lengths must have non-empty strings as names"),
        (([3, 4], [0.5, 0.4]), ValueError, "weights must be .*sum to 1 within 1e-6; got sum 0.9 .*divide"),
        (([3, 4], [0.5, 0.50001]), ValueError, "weights must be .*sum to 1"),
        (([3, 4], [1.5, -0.5]), ValueError, "weights must be at least 0"),
        (([3, 4], [float("nan"), 1.0]), ValueError, "weights must be at least 0.*got sum (nan|inf)"),
        (([3, 4], [float("inf"), 1.0]), ValueError, "weights must be at least 0.*got sum (nan|inf)"),
        (([3, 4], [True, False]), TypeError, "weights must be numbers; got"),
        (([3, 4], ["0.5", "0.5"]), TypeError, "weights must be numbers; got"),
        (([3, 4], [None, 1.0]), TypeError, "weights must be a sequence or mapping of numbers"),
        (([3, 4], 1.0), TypeError, "weights must be a sequence or mapping of numbers"),
        (([3, 4], [1.0]), ValueError, "one number per domain, 2; got 1"),
        (([3, 4], {"a": 0.5, "b": 0.5}), ValueError, "weights must be a sequence, as lengths has no names"),
        (({"a": 3, "b": 4}, {"a": 0.5, "c": 0.5}), ValueError, r"names of lengths, \['a', 'b'\]; got \['a', 'c'\]"),
        (({"a": 3, "b": 4}, {"a": 1.0}), ValueError, "weights must have the names of lengths"),
        (({"a": 3, "b": 0}, {"a": 0.5, "b": 0.5}), ValueError, "weights must be 0 for domains without items.*'b'"),
        (([0, 3], [0.1, 0.9]), ValueError, "weights must be 0 for domains without items.*domain 0"),
        (([3], [1.0], -1), ValueError, "seed must be an int from 0 to"),
        (([3], [1.0], 2**64), ValueError, "seed must be an int from 0 to"),
        (([3], [1.0], 0.5), ValueError, "seed must be an int from 0 to .*; got 0.5"),
        (([3], [1.0], 0, 2, 2), ValueError, "rank must be an int from 0 to 1; got 2"),
        (([3], [1.0], 0, 0, 0), ValueError, "world_size must be an int of at least 1; got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        MixtureSampler(*arguments)


def test_numbers_of_numpy_and_torch_are_taken():
    torch = pytest.importorskip("torch")
    expected = uninterrupted(100)
    for weights in (np.array(FIRST), torch.tensor(FIRST, dtype=torch.float64), tuple(FIRST)):
        assert take(MixtureSampler(np.array(LENGTHS), weights, seed=np.int64(3)), 100) == expected


@pytest.mark.parametrize("weights", [[0.5, 0.4], [0.5, 0.5, 0.0], [float("nan"), 1.0], {"a": 1.0, "b": 0.0}])
def test_bad_weights_leave_the_sampler_as_it_was(weights):
    sampler = MixtureSampler([30, 40], [0.5, 0.5])
    expected = take(copy.deepcopy(sampler), 50)
    with pytest.raises(ValueError, match="weights must"):
        sampler.set_weights(weights)
    with pytest.raises(ValueError, match=r"at must be an int from 0 to .*; got 1\.5"):
        sampler.set_weights([0.1, 0.9], at=1.5)
    assert take(sampler, 50) == expected


def put(*path, value):
    def damage(state):
        inner = state
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("version", value=2), "version 1; got 2"),
        (lambda state: state.pop("version"), "version 1; got None"),
        (put("seed", value=4), "seed of the state must be that of the sampler, 3; got 4"),
        (put("lengths", value=[700, 90, 11, 3001]), "lengths of the state"),
        (put("domains", value=["a", "b", "c", "d"]), "domains of the state"),
        (lambda state: state.pop("block"), "field is missing or wrong.*block"),
        (put("origin", value=None), "field is missing or wrong"),
        (put("consumed", value=True), "consumed must be an int from 0 to .*; got True"),
        (put("consumed", value=-1), "consumed must be an int from 0"),
        (put("consumed", value=90_000), "changes.at must be an int from 90001"),
        (put("consumed", value=50_000), "must start the block of sample 50000"),
        (
            put("block", value={"at": 20_000, "counts": [2750, 15_000, 1000, 1250]}),
            "must start the block of sample 22000",
        ),
        (put("block", "at", value=16_000), "block.counts must be"),
        (put("block", "counts", value=[0, 0, 0, 0]), "block.counts must be 4 numbers that sum to"),
        (put("block", "counts", value=[21_000, 0, 0]), "block.counts must be"),
        (put("block", "counts", 0, value=2**80), "block.counts must be"),
        (put("origin", "counts", value=[5000, 0, 0, 0]), "counts must follow the weights"),
        (put("origin", "at", value=4_999), "origin.counts must be"),
        (put("origin", "weights", value=[0.5, 0.5, 0.5, 0.5]), "weights must be .*sum to 1"),
        (put("origin", "weights", value=THIRD), "counts must follow the weights"),
        (put("changes", 0, "at", value=1), "changes.at must be"),
        (put("changes", value=[{"at": 90_000, "weights": FIRST}] * 2), "rising samples"),
    ],
)
def test_a_state_of_another_run_or_a_damaged_one_is_refused_and_changes_nothing(damage, message):
    sampler = MixtureSampler(LENGTHS, FIRST, seed=3)
    sampler.set_weights(SECOND, at=5_000)
    take(sampler, 22_000)
    sampler.set_weights(THIRD, at=90_000)
    state = sampler.state_dict()
    expected = take(copy.deepcopy(sampler), 100)
    bad = copy.deepcopy(state)
    damage(bad)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(bad)
    assert sampler.state_dict() == state
    assert take(sampler, 100) == expected


def test_a_state_that_is_no_mapping_is_refused():
    with pytest.raises(TypeError, match="state must be a mapping"):
        MixtureSampler([1], [1.0]).load_state_dict([1])


def test_a_state_of_the_same_names_in_another_order_is_refused():
    state = MixtureSampler({"a": 5, "b": 5}, [0.5, 0.5]).state_dict()
    with pytest.raises(ValueError, match="domains of the state"):
        MixtureSampler({"b": 5, "a": 5}, [0.5, 0.5]).load_state_dict(state)
