"""Whether other fits find the same, and how faithful a transcoder is."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dctlib.paper.plots import COLOURS, panels, style

_DIRECTIONS = {"random": (COLOURS["random"], "o"), "factors": (COLOURS["DCT"], "s"), "mixed": (COLOURS["clean"], "D")}


def stability(variants: pd.DataFrame, errors: pd.DataFrame) -> Figure:
    """How alike two fits are, in vectors and in what they do, their best vectors' scores, and reconstruction errors.

    Parameters
    ----------
    variants : DataFrame
        One row a pair of fits, by name: ``cosine`` of matched factors, ``overlap`` of the spans and ``behaviour``
        (None where nothing is changed), means over models; ``each``, of every one of these a list, one value a model;
        and ``scores``, a pair of a model's two best vectors on test, in a list.
    errors : DataFrame
        Median relative error, one row a transcoder, one column what is compared.
    """
    with style():
        figure, (left, middle, right, last) = panels(4, height=3.3, ratios=(3, 2, 2, 2))
        places = np.arange(len(variants))[::-1]
        looks = {"cosine": (COLOURS["DCT"], "o"), "overlap": ("0.55", "s"), "behaviour": ("0.1", "^")}
        names = {"cosine": "factors", "overlap": "span", "behaviour": "behaviour"}
        for shift, (column, (colour, marker)) in zip((0.2, 0, -0.2), looks.items(), strict=True):
            left.scatter(
                variants[column].astype(float), places + shift, color=colour, marker=marker, s=16, label=names[column]
            )
            for place, each in zip(places, variants["each"], strict=True):
                known = [value for value in each[column] if value is not None] or [np.nan]
                ends = min(known), max(known)
                left.plot(ends, [place + shift] * 2, color=colour, lw=0.8)
        left.set_yticks(places, list(variants.index))
        left.set(xlim=(0, 1.02), xlabel="likeness of the two fits")
        left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, handletextpad=0)
        for place, scores in zip(places, variants["scores"], strict=True):
            for shift, of in zip(_shifts(len(scores)), scores, strict=True):
                middle.plot(of, [place + shift] * 2, color="0.3", marker="o", ms=3, lw=0.8)
        middle.axvline(0, color="0.8", lw=0.8, zorder=0)
        middle.set_yticks(places, [])
        middle.set(xlabel="scores of their best")
        second = [str(column) for column in errors if str(column).startswith("Hessian, ")]
        _errors(right, errors.drop(columns=second), "relative error of Δ")
        own = pd.DataFrame({column.removeprefix("Hessian, "): errors[column] for column in second})
        _errors(last, own, "of Hessian")
        for panel in (right, last):
            panel.set_xlim(0.8 * errors.min(axis=None), 1.25 * errors.max(axis=None))
        last.set_yticks(last.get_yticks(), [""] * len(errors))
        sns.despine(figure)
    return figure


def _shifts(count: int) -> np.ndarray:
    """Heights around a row's, so that `count` marks stand one above the other; its own for a single one."""
    return np.linspace(0.2, -0.2, count) if count > 1 else np.zeros(count)


def _errors(axes: Axes, errors: pd.DataFrame, label: str) -> None:
    """Median relative errors, one row a transcoder, one colour a kind of direction."""
    rows = np.arange(len(errors))[::-1]
    for shift, (kind, values) in zip(_shifts(errors.shape[1]), errors.items(), strict=True):
        colour, marker = _DIRECTIONS[str(kind)]
        axes.scatter(values, rows + shift, color=colour, marker=marker, s=16, label=str(kind))
    axes.axvline(1, color="0.6", lw=0.8, ls=":")
    axes.set_yticks(rows, [*map(str, errors.index)])
    axes.set(xlabel=label, xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1, handletextpad=0)
