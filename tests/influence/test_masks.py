"""Counting target tokens: the mask's helper, and what the engine sees of the cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tikmix_fast import shifted_mask
from tikmix_fast.influence.loss.watched_losses import targets_and_weight, watch_losses


def test_shifted_mask_counts_what_transformers_counts():
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100], [-100, 7, 8, -100]])
    expected = [[True, True, True, False], [True, False, False, False], [True, True, False, False]]
    assert shifted_mask(labels).tolist() == expected
    assert shifted_mask(labels.masked_fill(labels == -100, 0), ignore_index=0).tolist() == expected
    assert shifted_mask(labels).device == labels.device


def test_shifted_mask_refuses():
    with pytest.raises(TypeError, match="float32"):
        shifted_mask(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\[B, S\]"):
        shifted_mask(torch.zeros(3, dtype=torch.int64))


LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, -100, 3, 4, -100])


def told(loss_of):
    logits = LOGITS.clone().requires_grad_()
    with watch_losses() as seen:
        loss_of(logits).backward()
    return targets_and_weight(seen.summaries())


@pytest.mark.parametrize(
    ("loss_of", "targets", "weight"),
    [
        (lambda x: F.cross_entropy(x, TARGET), 4, 1 / 4),
        (lambda x: F.cross_entropy(x, TARGET) * 8 / 3, 4, 2 / 3),
        (lambda x: F.cross_entropy(x, TARGET, reduction="sum"), 4, 1),
        (lambda x: torch.nn.CrossEntropyLoss(ignore_index=0, reduction="sum")(x, TARGET.clamp(min=0)), 3, 1),
        (lambda x: F.nll_loss(x.log_softmax(-1), TARGET, reduction="none").sum() / 7, 4, 1 / 7),
        (lambda x: (F.cross_entropy(x, TARGET.clamp(min=0), reduction="none") * (TARGET > 0)).sum() / 3, 3, 1 / 3),
        (lambda x: F.cross_entropy(x, torch.full((6, 5), 0.2)), 6, 1 / 6),
        (lambda x: F.cross_entropy(x[:3], TARGET[:3]) / 2 + F.cross_entropy(x[3:], TARGET[3:]) / 2, 4, 1 / 4),
        (lambda x: sum(F.cross_entropy(x[i : i + 2], TARGET[i : i + 2], reduction="sum") for i in (0, 2, 4)), 4, 1),
    ],
)
def test_targets_and_their_weight(loss_of, targets, weight):
    found = told(loss_of)
    assert found[0] == targets
    assert found[1] == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda x: x.sum(),
        lambda x: F.cross_entropy(x, TARGET, weight=torch.ones(5)),
        lambda x: F.cross_entropy(x, TARGET) + 0.1 * F.cross_entropy(x[:2], TARGET[:2]),
        lambda x: (F.cross_entropy(x, TARGET, reduction="none") * torch.arange(6)).sum(),
        lambda x: x.sum() + 0 * F.cross_entropy(x.detach(), TARGET),
    ],
)
def test_what_cannot_be_told_is_not(loss_of):
    assert told(loss_of) is None


def test_other_threads_are_not_watched():
    import threading

    logits = LOGITS.clone().requires_grad_()
    with watch_losses() as seen:
        thread = threading.Thread(target=lambda: F.cross_entropy(LOGITS.clone().requires_grad_(), TARGET).backward())
        thread.start()
        thread.join()
        F.cross_entropy(logits, TARGET).backward()
    assert len(seen.losses) == 1


def test_the_original_is_back():
    original = F.cross_entropy, F.nll_loss
    with pytest.raises(KeyError), watch_losses():
        raise KeyError
    assert (F.cross_entropy, F.nll_loss) == original


def test_a_function_mode_does_not_count_twice():
    """``torch.set_default_device`` is one: under it torch calls ``F.cross_entropy`` a second time by its name."""
    with torch.device("cpu"):
        assert told(lambda x: F.cross_entropy(x, TARGET)) == (4, pytest.approx(1 / 4))
