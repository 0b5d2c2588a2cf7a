"""Whether other fits find the same, and how faithful a transcoder is."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dctlib.plots import COLOURS, panels, style


def stability(variants: pd.DataFrame, errors: pd.DataFrame) -> Figure:
    """Likeness of other fits to the reference, the scores of their best vectors, and reconstruction errors.

    Parameters
    ----------
    variants : DataFrame
        One row a fit, by name: ``cosine`` of matched factors, ``overlap`` of the spans, and ``score`` on test.
    errors : DataFrame
        Median relative error, one row a transcoder, one column what is compared.
    """
    with style():
        figure, (left, middle, right) = panels(3, height=3.1, ratios=(3, 2, 3))
        places = np.arange(len(variants))[::-1]
        left.scatter(variants["cosine"], places, color=COLOURS["DCT"], s=18, label="factors, cosine")
        left.scatter(variants["overlap"], places, color=COLOURS["random"], s=18, marker="s", label="span, overlap")
        left.set_yticks(places, list(variants.index))
        left.set(xlim=(0, 1.02), xlabel="likeness to the reference")
        left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, handletextpad=0)
        middle.scatter(variants["score"], places, color="0.3", s=18)
        middle.axvline(0, color="0.8", lw=0.8, zorder=0)
        middle.set_yticks(places, [])
        middle.set(xlabel="score of its best, test")
        rows = np.arange(len(errors))[::-1]
        for colour, marker, (kind, values) in zip(
            sns.color_palette("colorblind")[2:], "osDv^", errors.items(), strict=False
        ):
            right.scatter(values, rows, color=colour, marker=marker, s=18, label=str(kind))
        right.axvline(1, color="0.6", lw=0.8, ls=":")
        right.set_yticks(rows, [*map(str, errors.index)])
        right.set(xlabel="relative error, median", xlim=(0, None))
        right.legend(
            frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.35, 1.0), ncols=2, handletextpad=0
        )
        sns.despine(figure)
    return figure
