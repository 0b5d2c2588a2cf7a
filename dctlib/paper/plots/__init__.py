"""Figures from arrays: one module a notebook, and here what they share. Nothing here touches a model or a window."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dctlib._io import atomic_path
from dctlib.evaluation.statistics import Interval

WIDTH = 7.0
"""Inches: the text width of a page."""

COLOURS: dict[str, tuple] = dict(zip(["DCT", "random", "clean"], sns.color_palette("colorblind"), strict=False))


@contextmanager
def style() -> Iterator[None]:
    settings: Any = {
        **sns.axes_style("ticks"),
        **sns.plotting_context("paper"),
        "svg.hashsalt": "dctlib",
        "font.size": 9,
    }
    with mpl.rc_context(settings):
        yield


def save_figure(figure: Figure, stem: Path) -> Path:
    """Write <stem>.png and <stem>.svg, each whole or not at all and with no date inside; return the former's path."""
    options: dict[str, Any] = {".png": {"dpi": 200}, ".svg": {"metadata": {"Date": None}}}
    for suffix in options:
        with style(), atomic_path(stem.with_suffix(suffix)) as partial:
            figure.savefig(partial, bbox_inches="tight", **options[suffix])
    return stem.with_suffix(".png")


def panels(count: int, *, height: float, ratios: Sequence[float], width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, width_ratios=ratios, squeeze=False)[0])


def errorbar(axes: Axes, place: float, mean: Interval, *, across: bool = False, **style: Any) -> None:
    """A mean and its interval: upright at x = `place`, or `across` at y = `place`."""
    sides = [[mean.mean - mean.low], [mean.high - mean.mean]]
    at, spread = ((mean.mean, place), {"xerr": sides}) if across else ((place, mean.mean), {"yerr": sides})
    options: dict[str, Any] = {"fmt": "o", "ms": 4, "capsize": 2, **spread, **style}
    axes.errorbar(*at, **options)


def label_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, tuple]]) -> None:
    """Write each line's name at its right end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.085 * (max(high, max(y for y, _, _ in ends)) - min(low, 0))
    last = -np.inf
    for y, label, colour in sorted(ends):
        last = max(y, last + gap)
        axes.annotate(
            label,
            (x, y),
            xytext=(x * 1.03, last),
            textcoords="data",
            color=colour,
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
