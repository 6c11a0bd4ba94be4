"""Rows of activations are matched to domains, or refused: never guessed."""

from __future__ import annotations

import pytest
import torch

from tikmix_fast.influence.capture.rows import RowLabels, RowShapeError

CPU = torch.device("cpu")
IDS = torch.tensor([2, 0, 2])
POSITIONS = torch.tensor([[0, 1, 1, 2], [2, 2, 0, 0], [1, 0, 1, 0]])


def domains_of(labels, leading):
    """Reconstruct the domain of each row from offsets and order, as the kernel reads them."""
    layout = labels.layout(leading, CPU)
    offsets = layout.offsets.tolist()
    order = range(offsets[-1]) if layout.order is None else layout.order.tolist()
    rows = [-1] * offsets[-1]
    for domain in range(labels.n_domains):
        for place in range(offsets[domain], offsets[domain + 1]):
            rows[order[place]] = domain
    assert layout.domains.repeat_interleave(layout.run).tolist() == rows
    values = torch.randn(len(rows), 2, dtype=torch.float64)
    each = torch.nn.functional.one_hot(torch.tensor(rows, dtype=torch.int64), labels.n_domains).double()
    torch.testing.assert_close(layout.sum_domains(layout.sum_runs(values)), each.T @ values)
    return torch.tensor(rows).reshape(leading)


@pytest.mark.parametrize("leading", [(3, 4), (3,), (12,), (3, 4, 2), (3, 2)])
def test_per_sequence(leading):
    rows = domains_of(RowLabels(IDS, 4, length=4), leading)
    per_row = rows.reshape(3, -1)
    assert torch.equal(per_row, IDS[:, None].expand_as(per_row))


@pytest.mark.parametrize("leading", [(3, 4), (12,), (3, 4, 2)])
def test_per_position(leading):
    rows = domains_of(RowLabels(POSITIONS, 3), leading).reshape(3, 4, -1)
    assert torch.equal(rows, POSITIONS[..., None].expand_as(rows))


@pytest.mark.parametrize("leading", [(4, 3), (12,), (4, 3, 2)])
def test_second_dimension(leading):
    rows = domains_of(RowLabels(POSITIONS, 3, batch_dim=1), leading).reshape(4, 3, -1)
    assert torch.equal(rows, POSITIONS.T[..., None].expand_as(rows))
    rows = domains_of(RowLabels(IDS, 3, batch_dim=1, length=4), leading).reshape(4, 3, -1)
    assert torch.equal(rows, IDS[None, :, None].expand_as(rows))


def test_one_domain_fits_any_shape():
    for ids in (1, torch.tensor([1, 1, 1]), torch.ones(3, 4, dtype=torch.int64)):
        labels = RowLabels(ids, 3)
        for leading in ((5,), (1, 7), (2, 3, 4), (), (0,)):
            assert (domains_of(labels, leading) == 1).all()


def test_runs_are_as_long_as_the_rows_allow():
    assert RowLabels(IDS, 3).layout((3, 4), CPU).run == 4
    assert RowLabels(torch.tensor([0, 0, 2, 2]), 3).layout((4, 5), CPU).run == 10
    assert RowLabels(POSITIONS, 3).layout((3, 4), CPU).run == 1
    assert RowLabels(1, 3).layout((3, 4), CPU).run == 12
    assert RowLabels(torch.tensor([0, 1]), 2, batch_dim=1).layout((3, 2), CPU).run == 1


@pytest.mark.parametrize("ids", [torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])])
def test_sums_of_half_precision_are_wider(ids):
    layout = RowLabels(ids.repeat_interleave(512), 2).layout((2048,), CPU)
    rows = (1 + torch.arange(2048) % 3 / 128).to(torch.bfloat16)[:, None]
    members = torch.nn.functional.one_hot(layout.domain_of_rows(), 2).double()
    # Exact in float32, and neither the sums of the domains nor those of the runs are bfloat16 numbers.
    assert layout.sum_domains(layout.sum_runs(rows)).tolist() == (members.T @ rows.double()).tolist()


def test_sorted_rows_need_no_order():
    assert RowLabels(torch.tensor([0, 0, 2]), 3).layout((3, 4), CPU).order is None
    assert RowLabels(IDS, 3).layout((3, 4), CPU).order is not None


@pytest.mark.parametrize(
    ("labels", "leading"),
    [
        (RowLabels(IDS, 3), (4, 3)),
        (RowLabels(IDS, 3), (7,)),
        (RowLabels(IDS, 3), ()),
        (RowLabels(IDS, 3), (1, 4)),
        (RowLabels(IDS, 3, length=5), (12,)),
        (RowLabels(POSITIONS, 3), (3,)),
        (RowLabels(POSITIONS, 3), (3, 5)),
        (RowLabels(POSITIONS, 3), (4, 3)),
        (RowLabels(POSITIONS, 3), (15,)),
        (RowLabels(IDS, 3, batch_dim=1), (3, 4)),
    ],
)
def test_anything_else_is_refused(labels, leading):
    assert not labels.are_rows(leading)
    with pytest.raises(RowShapeError, match="do not match the ids"):
        labels.layout(leading, CPU)


def test_as_many_sequences_as_positions_must_be_told():
    square = torch.tensor([[0, 1], [0, 0]])
    with pytest.raises(RowShapeError, match="batch_dim=0"):
        RowLabels(square, 2)
    with pytest.raises(RowShapeError, match="batch_dim=0"):
        RowLabels(torch.tensor([0, 1]), 2).are_rows((2, 2))
    assert domains_of(RowLabels(square, 2, batch_dim=0), (2, 2)).tolist() == square.tolist()
    assert domains_of(RowLabels(square, 2, batch_dim=1), (2, 2)).tolist() == square.T.tolist()
    assert RowLabels(torch.tensor([1, 1]), 2).are_rows((2, 2)), "one domain needs no telling"


def test_the_first_activation_tells_the_length():
    labels = RowLabels(IDS, 3)
    assert not labels.are_rows((12,))
    assert not labels.are_rows((3,)), "may be positions"
    assert labels.are_features((3,)), "the inputs of a model without positions"
    assert labels.are_rows((3, 4))
    assert labels.length == 4
    assert labels.are_rows((12,))
    assert not labels.are_rows((3, 5))
    assert labels.are_features((3, 5)), "other positions of the same sequences"
    assert not labels.are_rows((6,))
