"""Draw the figures of the report as inline SVG without network requests.

`stages` instead writes a file, for the documentation.

Shapes:  N entries of one metric
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float64
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from orchard.evaluation.bootstrap import Estimate
from orchard.tracking.metrics_log import Series

INK, FAINT, GRID = "#1c2733", "#66727f", "#e3e8ec"
COLOURS = ("#1f6f54", "#c8553d", "#3d6fb4", "#b98a1d", "#7a5195")

_STYLE: Any = {
    "svg.fonttype": "none",  # keep text as small, selectable text in the page's font
    "text.parse_math": False,  # metric names may contain any character
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 6),
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    # Fixed margins: fitting them to the text would double the time of a figure.
    "figure.subplot.left": 0.11,
    "figure.subplot.right": 0.985,
    "figure.subplot.top": 0.91,
    "figure.subplot.bottom": 0.2,
}
_SHADES = mpl.colormaps["viridis"]
_SMOOTH_FROM = 40
"""Number of entries from which a curve also gets a running mean, over 1/20 of its entries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Curve of one metric in a figure."""

    label: str
    series: Series


def apply_style(salt: str) -> Any:
    """Return the style of all figures; equal figures with the same salt are equal bytewise."""
    return _STYLE | {"svg.hashsalt": salt}


def curves(
    metrics: Sequence[Curve],
    *,
    title: str,
    steps: str = "step",
    log: bool = False,
    is_share: bool = False,
) -> Markup:
    """Plot metrics over steps; long ones are faint, with their running mean on top.

    Each has at least one finite value. `log` selects a logarithmic axis if all are positive,
    `is_share` one from 0 to 100 %.
    """
    with mpl.rc_context(apply_style(title)):
        figure = Figure(figsize=(5.6, 2.3))
        axes = figure.subplots()
        for curve, color in zip(metrics, _cycle_colors(len(metrics)), strict=True):
            step, value = curve.series.step, curve.series.value
            long = len(value) >= _SMOOTH_FROM
            marker = "o" if len(value) <= 25 else ""
            axes.plot(
                step, value, color=color, alpha=0.3 if long else 1.0, lw=0.9 if long else 1.5,
                marker=marker, ms=3, label=None if long else curve.label,
            )  # fmt: skip
            if long:
                smooth = running_mean(value, width=max(3, len(value) // 20))
                axes.plot(step, smooth, color=color, lw=1.6, label=curve.label)
        values = np.concatenate([curve.series.value for curve in metrics])
        values = values[np.isfinite(values)]
        low, high = float(values.min()), float(values.max())
        if is_share:
            axes.set_ylim(-0.02, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        elif log and low > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            # The default minor labels use math fonts that the page does not include.
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif high - low <= 1e-6 * max(abs(low), abs(high)):
            # Center a constant, instead of scaling its rounding errors to full height.
            axes.set_ylim(low - 0.1 * abs(low or 1.0), high + 0.1 * abs(high or 1.0))
        axes.set_xlabel(steps)
        _legend(axes, len(metrics))
        return _svg(figure, title)


def forest(changes: Mapping[str, Mapping[str, Estimate]], metrics: Sequence[str]) -> Markup:
    """Plot paired differences with intervals: one row per metric, one color per comparison."""
    title = "Paired differences, 95 % interval"
    with mpl.rc_context(apply_style(title)):
        height = 0.6 + 0.34 * len(metrics)
        figure = Figure(figsize=(5.6, height))
        figure.subplots_adjust(left=0.19, top=1 - 0.25 / height, bottom=0.3 / height)
        axes = figure.subplots()
        axes.axvline(0, color=FAINT, lw=0.9)
        gap = 0.6 / max(1, len(changes))
        for index, (name, color) in enumerate(
            zip(changes, _cycle_colors(len(changes)), strict=True)
        ):
            rows = [(i, changes[name][m]) for i, m in enumerate(metrics) if m in changes[name]]
            row_height = [i + (index - (len(changes) - 1) / 2) * gap for i, _ in rows]
            mean = np.asarray([estimate.mean for _, estimate in rows])
            low = mean - [estimate.low for _, estimate in rows]
            high = np.asarray([estimate.high for _, estimate in rows]) - mean
            axes.errorbar(
                mean, row_height, xerr=np.maximum([low, high], 0), fmt="o", ms=4, lw=1.4,
                color=color, label=name,
            )  # fmt: skip
        axes.set_yticks(range(len(metrics)), labels=list(metrics))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        _legend(axes, len(changes))
        return _svg(figure, title)


def tree(example: Mapping[str, Any]) -> Markup:
    """Draw a search tree from left to right, with candidates at the end (see `search_examples`).

    Thick edges are likely choices. Nodes are colored by value, or by log-probability if
    there are no values. Prefixes that a beam of as many candidates lacks are hollow and dotted.
    """
    node, title = example["node"], f"Search tree of row {example['row']}"
    position = _positions(example)
    marks = [n["score"] if n["value"] is None else n["value"] for n in node]
    low, high = min(marks[1:], default=0.0), max(marks[1:], default=1.0)
    with mpl.rc_context(apply_style(title)):
        height = 0.5 + 0.21 * len(example["candidate"])
        figure = Figure(figsize=(11.6, height))
        figure.subplots_adjust(left=0.01, right=0.55, top=1 - 0.05 / height, bottom=0.05 / height)
        axes = figure.subplots()
        axes.set_axis_off()
        for index, entry in enumerate(node):
            x, y = position[index]
            style = "-" if entry["beam"] else ":"
            if entry["parent"] >= 0:
                parent = node[entry["parent"]]
                chance = math.exp(min(0.0, entry["score"] - parent["score"]))
                axes.plot(
                    *zip(position[entry["parent"]], (x, y), strict=True), style, color=FAINT,
                    lw=0.5 + 3 * chance, zorder=1,
                )  # fmt: skip
            shade = 0.0 if high == low else (marks[index] - low) / (high - low)
            color = _SHADES(float(np.clip(shade, 0, 1)))
            axes.scatter(
                [x], [y], s=42, zorder=2, color=color if entry["beam"] else "white",
                edgecolors=color, linewidths=1.4,
            )  # fmt: skip
            if index and entry["step"] < max(n["step"] for n in node):
                axes.annotate(entry["name"], (x, y), (0, 5), textcoords="offset points", fontsize=7)
        for rank, entry in enumerate(example["candidate"], 1):
            x, y = position[entry["node"]]
            hit = entry["name"] == example["target"]
            text = f"{rank:>2}   {entry['reward']:+.2f}   {entry['score']:.2f}   {entry['name']}"
            axes.annotate(
                text, (x, y), (9, 0), textcoords="offset points", va="center", fontsize=8,
                color=COLOURS[0] if hit else INK, annotation_clip=False,
                fontweight="bold" if hit else "normal",
            )  # fmt: skip
        return _svg(figure, title)


def stages(
    path: Path, panels: Mapping[str, tuple[Sequence[int], Mapping[str, Sequence[float]]]]
) -> None:
    """Plot the busy share of each stage over the number of GPUs, with one panel per title.

    Writes SVG or PNG by the suffix of `path`; equal figures give equal files.
    """
    with mpl.rc_context(apply_style(path.name)):
        figure = Figure(figsize=(5.0 * len(panels), 3.1), facecolor="white")
        figure.subplots_adjust(left=0.07, right=0.99, wspace=0.14, bottom=0.16, top=0.82)
        for axes, (title, (gpus, busy)) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            for (stage, share), color in zip(busy.items(), _cycle_colors(len(busy)), strict=True):
                axes.plot(gpus, share, color=color, lw=1.6, marker="o", ms=3, label=stage)
            axes.set_xscale("log", base=2)
            axes.set_xticks(gpus, labels=[str(count) for count in gpus])
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set_xlabel("GPUs")
            axes.set_title(title, fontsize=9, loc="left", pad=18)
            axes.legend(
                loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=len(busy), handlelength=1.2,
                columnspacing=1.2, borderaxespad=0.1,
            )  # fmt: skip
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _positions(example: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return step and height of each node: leaves are stacked, parents centered on children."""
    node = example["node"]
    children: list[list[int]] = [[] for _ in node]
    for index, entry in enumerate(node[1:], 1):
        children[entry["parent"]].append(index)
    height, num_leaves = [0.0] * len(node), 0
    for index in range(len(node)):
        if not children[index]:
            height[index], num_leaves = -float(num_leaves), num_leaves + 1
    for index in reversed(range(len(node))):  # preorder: children come after their parent
        if children[index]:
            height[index] = float(np.mean([height[child] for child in children[index]]))
    return [(float(entry["step"]), h) for entry, h in zip(node, height, strict=True)]


def running_mean(value: Float64[np.ndarray, " N"], *, width: int) -> Float64[np.ndarray, " N"]:
    """Compute the mean of the `width` entries around each, ignoring NaN; NaN near the ends."""
    finite = np.isfinite(value)
    # Prefix sums: entries [low, high) have total[high] - total[low] and count[high] - count[low].
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, value, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(value))
    # The window is symmetric, so that a straight line stays straight. It shrinks toward the ends,
    # and where it is too small to smooth the curve there is no mean.
    half = np.minimum(width // 2, np.minimum(index, index[::-1]))
    low, high = index - half, index + half + 1
    size = count[high] - count[low]
    enough = (size > 0) & (half >= width // 4)
    return np.where(enough, (total[high] - total[low]) / np.maximum(size, 1), np.nan)


def _legend(axes: Axes, num: int) -> None:
    """Add a legend above the axes, where it cannot overlap a curve; none for a single curve."""
    if num > 1:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=num, borderpad=0.1, borderaxespad=0.1,
            handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip


def _cycle_colors(num: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(num)]


def _svg(figure: Figure, label: str) -> Markup:
    """Return the figure as an SVG element that scales with its column."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Inline SVG needs neither namespaces nor metadata of the drawing program; both contain URLs,
    # and the page must contain none.
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\sxmlns(:\w+)?=\"[^\"]*\"", "", text)
    # Use the page's font, and remove ids that two figures would share.
    text = re.sub(r"\s?font-family:[^;\"]*;?", "", text)
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)
    # The inks of the page, which differ in its dark mode.
    inks = {INK: "--ink", FAINT: "--faint", GRID: "--line", COLOURS[0]: "--leaf"}
    for color, variable in inks.items():
        text = text.replace(color, f"var({variable})")
    head, _, body = text.partition(">")
    head = re.sub(r"\s(width|height|version)=\"[^\"]*\"", "", head)
    return Markup(f'{head} role="img" aria-label="{escape(label)}">{body}')
