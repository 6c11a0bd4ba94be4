"""The better of two mixtures by direct labels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tikmix_fast import choose_by_labels, tikmix_d


@pytest.fixture
def both():
    direct = tikmix_d([[2.0, 1.0], [1.0, 1.5]], [0.5, 0.5])
    return direct, dataclasses.replace(direct, weights=np.array([0.1, 0.9]))


@pytest.mark.parametrize("minimise", [False, True])
@pytest.mark.parametrize("better", ["direct", "found", "neither"])
def test_the_better_one_is_returned(both, better, minimise):
    direct, found = both
    gains = {"direct": [[1.0, 2.0], [0.5, 2.0]], "found": [[0.5, 2.0], [1.0, 2.0]], "neither": [[1.0, 1.0]] * 2}[better]
    seen = []

    def labels_of(mixtures):
        seen.append(mixtures.copy())
        return -np.array(gains) if minimise else gains

    chosen = choose_by_labels(direct, found, labels_of, minimise=minimise)
    assert np.array_equal(seen, [[direct.weights, found.weights]])
    assert np.array_equal(chosen.weights, (found if better == "found" else direct).weights)
    assert ("adds nothing" in chosen.message) == (better != "found")


def test_scale_decides_what_a_label_weighs(both):
    labels = [[3.0, 0.0], [0.0, 1.0]]
    assert choose_by_labels(*both, lambda _: labels).weights is both[0].weights
    assert choose_by_labels(*both, lambda _: labels, scale=[30.0, 1.0]).weights is both[1].weights


@pytest.mark.parametrize(
    ("labels", "scale", "named"),
    [([[1.0], [np.nan]], 1.0, "labels_of"), ([1.0, 2.0], 1.0, "labels_of"), ([[1.0], [2.0]], 0.0, "scale"),
     ([[1.0], [2.0]], [1.0, 2.0], "scale")],
)  # fmt: skip
def test_bad_labels_are_refused(both, labels, scale, named):
    with pytest.raises(ValueError, match=named):
        choose_by_labels(*both, lambda _: labels, scale=scale)


def test_other_domains_are_refused(both):
    with pytest.raises(ValueError, match="found must be over the domains of direct"):
        choose_by_labels(both[0], dataclasses.replace(both[1], domains=("a", "b")), lambda _: [[1.0], [2.0]])
