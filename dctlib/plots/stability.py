"""Whether other fits find the same, and how faithful a transcoder is."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dctlib.plots import COLOURS, panels, style


def stability(variants: pd.DataFrame, errors: pd.DataFrame) -> Figure:
    """How alike two fits are, in vectors and in what they do, their best vectors' scores, and reconstruction errors.

    Parameters
    ----------
    variants : DataFrame
        One row a pair of fits, by name: ``cosine`` of matched factors, ``overlap`` of the spans, ``behaviour``, and
        ``scores``, a list of the two best vectors' on test.
    errors : DataFrame
        Median relative error, one row a transcoder, one column what is compared.
    """
    with style():
        figure, (left, middle, right) = panels(3, height=3.1, ratios=(3, 2, 3))
        places = np.arange(len(variants))[::-1]
        looks = {"cosine": (COLOURS["DCT"], "o"), "overlap": ("0.55", "s"), "behaviour": ("0.1", "^")}
        names = {"cosine": "factors", "overlap": "span", "behaviour": "behaviour"}
        for shift, (column, (colour, marker)) in zip((0.2, 0, -0.2), looks.items(), strict=True):
            left.scatter(variants[column], places + shift, color=colour, marker=marker, s=16, label=names[column])
        left.set_yticks(places, list(variants.index))
        left.set(xlim=(0, 1.02), xlabel="likeness of the two fits")
        left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, handletextpad=0)
        for place, scores in zip(places, variants["scores"], strict=True):
            middle.plot(scores, [place] * len(scores), color="0.3", marker="o", ms=4, lw=0.8)
        middle.axvline(0, color="0.8", lw=0.8, zorder=0)
        middle.set_yticks(places, [])
        middle.set(xlabel="scores of their best")
        rows = np.arange(len(errors))[::-1]
        shifts = np.linspace(0.25, -0.25, errors.shape[1])
        for shift, colour, marker, (kind, values) in zip(
            shifts, [COLOURS["DCT"], "0.55", COLOURS["clean"], "0.1", "0.3"], "osDv^", errors.items(), strict=False
        ):
            right.scatter(values, rows + shift, color=colour, marker=marker, s=16, label=str(kind))
        right.axvline(1, color="0.6", lw=0.8, ls=":")
        right.set_yticks(rows, [*map(str, errors.index)])
        right.set(xlabel="relative error, median", xscale="log")
        right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.xaxis.set_major_formatter("{x:g}")
        right.xaxis.set_minor_formatter(NullFormatter())
        right.legend(
            frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.35, 1.0), ncols=2, handletextpad=0
        )
        sns.despine(figure)
    return figure
