"""The small GPT: it looks back only, its loss is the mean over positions, and its seed is its own."""

from __future__ import annotations

import pytest
import torch

from tikmix_fast.demo.gpt import GPT, GPTSettings

TINY = GPTSettings(layers=2, heads=2, width=16, length=12)


def test_a_later_byte_does_not_change_earlier_logits() -> None:
    model = GPT(TINY, seed=0)
    tokens = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_loss_is_the_mean_over_all_targets() -> None:
    model = GPT(TINY, seed=0)
    sequences = torch.randint(0, 256, (3, 13), generator=torch.Generator().manual_seed(1))
    probabilities = model(sequences[:, :-1]).double().softmax(-1)
    picked = [probabilities[row, place, sequences[row, place + 1]] for row in range(3) for place in range(12)]
    assert model.loss(sequences).item() == pytest.approx(-torch.stack(picked).log().mean().item(), rel=1e-5)


def test_equal_seeds_give_equal_weights_and_leave_the_global_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (GPT(TINY, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"layers": 0}, "layers must be an int of at least 1; got 0"),
        ({"width": 10, "heads": 4}, "width must be a multiple of heads"),
    ],
)
def test_settings_that_make_no_model_are_refused(numbers: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTSettings(**numbers)
