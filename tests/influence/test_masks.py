"""Counting target tokens: the mask's helper, and what the engine sees of the cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tikmix_fast import shifted_mask
from tikmix_fast.influence.target_counts import watch_losses


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


def test_losses_are_counted():
    logits = torch.randn(6, 5, requires_grad=True)
    target = torch.tensor([0, 1, -100, 3, 4, -100])
    with watch_losses() as seen:
        F.cross_entropy(logits, target)
    assert seen.targets == 4
    with watch_losses() as seen:
        F.cross_entropy(logits, target, reduction="sum")
        torch.nn.CrossEntropyLoss(reduction="sum", ignore_index=0)(logits, target.clamp(min=0))
        F.nll_loss(logits.log_softmax(-1), target, reduction="none")
    assert seen.targets == 4 + 3 + 4
    with watch_losses() as seen:
        F.cross_entropy(logits, torch.softmax(torch.randn(6, 5), -1))
    assert seen.targets == 6


def test_what_cannot_be_told_is_not():
    logits = torch.randn(6, 5, requires_grad=True)
    target = torch.arange(6) % 5
    with watch_losses() as seen:
        pass
    assert seen.targets is None
    with watch_losses() as seen:
        (F.cross_entropy(logits[:3], target[:3]) + F.cross_entropy(logits[3:], target[3:])).backward()
    assert seen.targets is None, "two means have no common count"
    with watch_losses() as seen:
        F.cross_entropy(logits, target, weight=torch.ones(5))
    assert seen.targets is None
    with watch_losses() as seen, torch.no_grad():
        F.cross_entropy(logits, target)
    assert seen.targets is None


def test_the_original_is_back():
    original = F.cross_entropy, F.nll_loss
    with pytest.raises(KeyError), watch_losses():
        raise KeyError
    assert (F.cross_entropy, F.nll_loss) == original
