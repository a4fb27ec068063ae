"""Plots of a report as SVG, whose text has the colour of the page around it."""

from __future__ import annotations

import io
import re
import statistics
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fp4.quality.report_data import Report, median_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# This colour is replaced by the page's text colour when the SVG is written.
_INK = "#010203"
# Readers who do not see all colours can tell these apart (Okabe and Ito), on white and on black.
_COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#8c6d46",
    "#7f7f7f",
    "#b8a900",
    "#6a51a3",
)
_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and searchable
    "font.family": "sans-serif",
    "font.size": 11,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}


def _names(measured: str) -> str:
    return "relative output error" if measured == "output_error" else "relative weight error"


def error_by_depth(report: Report) -> str | None:
    """Plot of the error over block number, a line for each kind of layer, None where no layer has a block number.

    Where a block has many layers of a kind, the line is their median, and an area shows their range.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.add_subplot()
        lines = 0
        for number, (kind, layers) in enumerate(report.by_kind().items()):
            depths: dict[int, list[float]] = {}
            for layer in layers:
                if layer["depth"] is not None:
                    depths.setdefault(layer["depth"], []).append(layer[report.measured])
            if not depths:
                continue
            lines += 1
            x, colour = sorted(depths), _COLOURS[number % len(_COLOURS)]
            style = ("-", "--", ":")[number // len(_COLOURS) % 3]
            axes.plot(
                x, [statistics.median(depths[d]) for d in x], style, color=colour, marker="o", markersize=3, label=kind
            )
            if any(len(values) > 1 for values in depths.values()):
                low, high = [min(depths[d]) for d in x], [max(depths[d]) for d in x]
                axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        if not lines:
            return None
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _error_axis(axes, "y", report.measured)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        return _svg(figure, f"{_names(report.measured)} along the depth of the model")


def error_by_kind(report: Report) -> str | None:
    """Plot with a dot for each layer and a row for each kind, the median marked; None without layers."""
    kinds = report.by_kind()
    if not kinds:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 0.8 + 0.36 * len(kinds)), layout="constrained")
        axes = figure.add_subplot()
        for row, layers in enumerate(kinds.values()):
            values = [layer[report.measured] for layer in layers]
            axes.plot(values, [row] * len(values), "o", color=_COLOURS[row % len(_COLOURS)], alpha=0.5, markersize=4)
            axes.plot([median_error(layers, report.measured)], [row], "|", color=_INK, markersize=16, markeredgewidth=2)
        axes.set_yticks(range(len(kinds)), list(kinds))
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        _error_axis(axes, "x", report.measured)
        return _svg(figure, f"{_names(report.measured)} of every layer by kind; the bar is the median")


def size_bar(report: Report) -> str | None:
    """Plot of the bytes of the checkpoint by what they hold; None where the sizes are unknown."""
    total = sum(report.sizes.values())
    if not total:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 1.9), layout="constrained")
        axes = figure.add_subplot()
        left = 0.0
        for number, (name, count) in enumerate(report.sizes.items()):
            label = f"{name}: {count / 1e6:,.1f} MB ({count / total:.0%})"
            axes.barh([0], [count / 1e6], left=[left], color=_COLOURS[number], label=label)
            left += count / 1e6
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0, left)
        axes.set_xlabel("MB")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, borderaxespad=0)
        return _svg(figure, "what the bytes of the checkpoint are")


def _error_axis(axes: Axes, axis: Literal["x", "y"], measured: str) -> None:
    chosen: Any = axes.xaxis if axis == "x" else axes.yaxis
    chosen.set_major_formatter(PercentFormatter(1, decimals=None))
    chosen.set_label_text(_names(measured))
    # The axis starts at zero, so that errors that are nearly equal look so.
    (axes.set_xlim if axis == "x" else axes.set_ylim)(0, 1.08 * max(*chosen.get_data_interval(), 1e-6))
    axes.grid(axis=axis, color=_INK, alpha=0.15, linewidth=0.7)


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # ids must differ between the plots of a page
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue().replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;]*?sans-serif", "sans-serif", svg)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{title}"', svg, count=1)
