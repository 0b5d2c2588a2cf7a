"""Sizes, colours and panels that all figures share."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dctlib._io import atomic_path

P = ParamSpec("P")

WIDTH = 7.0
"""The text width of a page, in inches."""

PALETTE = sns.color_palette("colorblind")

COLOURS: dict[str, tuple] = dict(zip(["DCT", "random", "clean"], PALETTE, strict=False))

_METHODS = {
    "random": COLOURS["random"],
    "power steering": PALETTE[4],
    "projected linear": PALETTE[9],
    "MELBO": PALETTE[3],
    "search": PALETTE[6],
    "difference of means": PALETTE[5],
    "sampling": (0.5,) * 3,
}


def method_colours(methods: Sequence[str]) -> dict[str, tuple]:
    """Return a colour for each method: shades of one for variants of DCT, dark grey where it has no own colour."""
    variants = [method for method in methods if method.startswith("DCT")]
    shades = sns.light_palette(COLOURS["DCT"], 2 * len(variants) + 1)[2::2]
    own = dict(zip(variants, shades, strict=True))
    return {method: own.get(method) or _METHODS.get(method, (0.25,) * 3) for method in methods}


@contextmanager
def style() -> Iterator[None]:
    """Apply matplotlib's settings for figures within a block."""
    settings: Any = {
        **sns.axes_style("ticks"),
        **sns.plotting_context("paper"),
        "svg.hashsalt": "dctlib",
        "font.size": 9,
    }
    with mpl.rc_context(settings):
        yield


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorate a function that draws a figure: apply the style, and remove the upper and right spines."""

    @functools.wraps(draw)
    def styled_draw(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style():
            figure = draw(*args, **kwargs)
            sns.despine(figure)
        return figure

    return styled_draw


def save_figure(figure: Figure, stem: Path) -> Path:
    """Write <stem>.png and <stem>.svg, without a date inside, and return the path of the PNG.

    A write that is interrupted leaves no partial file.
    """
    options: dict[str, Any] = {".png": {"dpi": 200}, ".svg": {"metadata": {"Date": None}}}
    for suffix in options:
        with style(), atomic_path(stem.with_suffix(suffix)) as partial:
            figure.savefig(partial, bbox_inches="tight", **options[suffix])
    return stem.with_suffix(".png")


def panels(ratios: Sequence[float], *, height: float, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side, whose widths are in these ratios."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0])


def note(axes: Axes, text: str, at: tuple[float, float], colour: Any = "0.4") -> None:
    """Write a small note above a point."""
    axes.annotate(text, at, xytext=(0, 3), textcoords="offset points", color=colour, fontsize=8)


def plain_log(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers, such as 1, 2, 5 and 10."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
