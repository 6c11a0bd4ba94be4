"""Charts as SVG inside a page. They use the page's CSS variables, so one chart serves light, dark and print."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tikmix_fast.report.pictures import stack_bands

__all__ = ["loss_chart", "mixture_chart", "sparkline"]

_BANDS = 9
_COLOURS = {
    name: f"#{number:06x}"
    for number, name in enumerate(("ink", "soft", "page", "l0", "l1", *(f"c{band}" for band in range(_BANDS))), 1)
}
"""A stand-in for every CSS variable: matplotlib takes colours only."""
_VARIABLES = {colour: f"var(--{name})" for name, colour in _COLOURS.items()}
# Without ticks and clipping, matplotlib writes no element that refers to another by its id.
_SETTINGS = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 11, "axes.linewidth": 0.7, "xtick.bottom": False,
    "ytick.left": False, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _COLOURS["soft"],
    **dict.fromkeys(("text.color", "xtick.labelcolor", "ytick.labelcolor"), _COLOURS["ink"]),
}  # fmt: skip
_style = style.context(["default", _SETTINGS])


@_style
def mixture_chart(weights: Sequence[tuple[int, Mapping[str, float]]], end: int, name: str) -> Markup:
    """Return the weight of every domain over steps, stacked, with its name at the right edge.

    Parameters
    ----------
    weights : sequence of (int, mapping)
        The step at which a mixture begins, and the mixture.
    end : int
        The last step.
    name : str
        The text alternative.
    """
    domains = list(weights[0][1])
    shares = np.array([[mixture[each] for each in domains] for _, mixture in weights])
    if len(domains) > _BANDS:  # those whose weight is ever largest, in their own order
        chosen = np.sort(np.argsort(-shares.max(axis=0), kind="stable")[: _BANDS - 1])
        domains = [*(domains[each] for each in chosen), "others"]
        shares = np.column_stack([shares[:, chosen], 1 - shares[:, chosen].sum(axis=1)])
    edges = [step for step, _ in weights] + [max(end, weights[-1][0] + 1)]
    figure, axes = _axes(360, 230, left=38, right=106, top=8, bottom=30)
    colours = [_COLOURS[f"c{band}"] for band in range(len(domains))]
    stack_bands(
        axes, edges, shares, [_short(each, 16) for each in domains], colours, gap=0.07, size=11,
        paper=_COLOURS["page"], leader=_COLOURS["soft"],
    )  # fmt: skip
    axes.set_xticks([edges[0], (edges[0] + edges[-1]) / 2, edges[-1]], [str(edges[0]), "step", str(edges[-1])])
    axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.spines[:].set_visible(False)
    return _svg(figure, name)


@_style
def loss_chart(lines: Mapping[str, Sequence[tuple[int, float]]], name: str) -> Markup:
    """Return one or two curves over steps: the first is solid, the second dashed. ``name`` is the text alternative."""
    points = np.array([point for line in lines.values() for point in line], dtype=float)
    if not len(points):
        return Markup("")
    (first, low), (last, high) = points.min(axis=0), points.max(axis=0)
    figure, axes = _axes(170, 118, left=34, right=10, top=8, bottom=20)
    for line, colour, dashes in zip(lines.values(), ("l0", "l1"), ("-", "--"), strict=False):
        axes.plot(*np.transpose(line), dashes, color=_COLOURS[colour], linewidth=2, clip_on=False)
    axes.set_xticks([first, last], [f"{first:.0f}", f"{last:.0f}"])
    axes.get_xticklabels()[-1].set_horizontalalignment("right")
    axes.set_yticks([low, high], [f"{low:.2f}", f"{high:.2f}"])
    axes.set_xlim(first, max(last, first + 1))
    axes.set_ylim((low, high) if high > low else (low - 0.5, high + 0.5))
    return _svg(figure, name)


@_style
def sparkline(values: Sequence[float], highest: float) -> Markup:
    """Return one small curve of steps from 0 to ``highest``, for the cell of a table that has the numbers too."""
    figure, axes = _axes(90, 22, top=2, bottom=2)
    axes.set_axis_off()
    axes.set(xlim=(0, len(values)), ylim=(0, highest or 1))
    axes.axhline(0, color=_COLOURS["soft"], linewidth=0.7, clip_on=False)
    axes.stairs(values, baseline=None, edgecolor=_COLOURS["l0"], linewidth=2, clip_on=False)
    return _svg(figure)


def _axes(width: int, height: int, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0) -> tuple[Figure, Axes]:
    """Return a new figure and its axes. Sizes and margins are in pixels of the page at its natural size."""
    figure = Figure(figsize=(width / 72, height / 72), frameon=False)
    place = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    axes = figure.add_axes(place)
    axes.patch.set_visible(False)
    return figure, axes


def _svg(figure: Figure, name: str = "") -> Markup:
    """Return ``figure`` as an element. Without a name it is hidden from screen readers."""
    content = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has more fonts
        figure.savefig(content, format="svg", metadata={"Date": None})
    drawing = ElementTree.fromstring(content.getvalue())
    for element in drawing.iter():
        element.tag, element.tail = element.tag.rpartition("}")[2], None
        element.text = element.text and element.text.strip()
        element.attrib.pop("id", None)
        looks = re.sub(r"font-family:[^;]*;", "", element.get("style", ""))
        if looks:
            element.set("style", re.sub("#[0-9a-f]{6}", lambda colour: _VARIABLES[colour[0]], looks))
    for unused in drawing.findall("metadata") + drawing.findall("defs"):
        drawing.remove(unused)
    label = {"role": "img", "aria-label": name} if name else {"aria-hidden": "true"}
    drawing.attrib = {"viewBox": drawing.attrib["viewBox"], **label}
    return Markup(ElementTree.tostring(drawing, encoding="unicode"))


def _short(text: str, most: int) -> str:
    """Return ``text`` in one line of printable characters: XML has no others."""
    text = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
    return text if len(text) <= most else text[: most - 1] + "…"
