"""Pictures: what they say is what was measured, and no label lies on another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.text import Text

from tikmix_fast.demo.results import DemoResult
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.report.pictures import _spread, draw_influence, draw_losses, draw_mixture, save_figure


def texts_that_overlap(figure: Figure) -> list[tuple[str, str]]:
    figure.canvas.draw()
    # Matplotlib keeps, and does not draw, the labels of ticks beyond the limits.
    beyond = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        if not min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())
    }
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in set(figure.findobj(Text)) - beyond
        if text.get_text().strip() and text.get_visible() and (text.axes is None or text.axes.get_visible())
    ]
    return [
        (first[0], second[0])
        for first, second in itertools.combinations(boxes, 2)
        if first[1].shrunk(0.95, 0.8).overlaps(second[1].shrunk(0.95, 0.8))
    ]


def test_cells_show_shares_errors_doubt_and_gaps(matrix: InfluenceMatrix) -> None:
    figure = draw_influence(matrix, "a title")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == [
        "+1.00\n±0.05",
        "-1.00\n±0.12",
        "-0.50\n±0.05",
        "+0.25\n±0.03",
        "(+0.05)\n±0.10",
        "?",
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(matrix.domains)
    assert [label.get_text() for label in axes.get_xticklabels()] == [task.replace(" ", "\n") for task in matrix.tasks]
    image = axes.images[0]
    assert image.get_clim() == (-1, 1)
    blue, red = (image.cmap(image.norm(value)) for value in (1.0, -1.0))
    assert blue[2] > blue[0]
    assert red[0] > red[2]


def test_a_row_of_zeros_is_drawn() -> None:
    figure = draw_influence(InfluenceMatrix.from_values([[0.0, 0.0]]))
    assert [text.get_text() for text in figure.axes[0].texts] == ["(+0.00)", "(+0.00)"]


def test_the_mixture_fills_every_stage(result: DemoResult) -> None:
    axes = draw_mixture(result).axes[0]
    steps = [patch.get_data() for patch in axes.patches if isinstance(patch, StepPatch)]
    assert sum((each.values - each.baseline).sum() for each in steps) == pytest.approx(3)
    assert {tuple(each.edges) for each in steps} == {(0, 100, 200, 300)}
    assert {"python", "docstrings", "noise"} <= {text.get_text() for text in axes.texts}


def test_every_task_has_its_panel_with_both_arms(result: DemoResult) -> None:
    figure = draw_losses(result)
    panels = {axes.get_title("left"): axes for axes in figure.axes if axes.get_visible()}
    assert set(panels) == {"numpy docs", "readmes", "sums"}
    for task, axes in panels.items():
        theirs, ours = (line for line in axes.lines if len(line.get_xdata()) == 3)
        assert ours.get_ydata().tolist() == [losses[task] for _, losses in result.tikmix.losses]
        assert theirs.get_ydata().tolist() == [losses[task] for _, losses in result.uniform.losses]
    assert panels["readmes"].get_title("right") == "-20.0%"
    assert panels["sums"].get_title("right") == "+20.0%"


@pytest.mark.parametrize(
    "draw", [draw_mixture, draw_losses, lambda result: draw_influence(result.boundaries[-1].matrix)]
)
def test_no_label_lies_on_another(result: DemoResult, draw, tmp_path) -> None:
    figure = draw(result)
    assert texts_that_overlap(figure) == []
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 9
    assert figure.get_figwidth() <= 5
    assert save_figure(figure, tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).map(sorted))
def test_spread_labels_keep_order_and_distance(places: list[float]) -> None:
    spread = _spread(np.array(places), 0.055)
    assert (np.diff(spread) >= 0.055 - 1e-12).all()
    assert spread[-1] <= 1.0
    assert spread[0] >= -1e-12 - 0.0 if len(places) * 0.055 <= 1 else True
    if (np.diff(places) >= 0.055).all():
        assert np.allclose(spread, places)
