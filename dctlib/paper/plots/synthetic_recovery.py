"""Recovery of planted factors."""

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dctlib.paper.plots import panels, style


def recovery_curves(curves: pd.DataFrame) -> Figure:
    """Recovery of planted factors by iteration, one line a start, with the spread over seeds.

    Parameters
    ----------
    curves : DataFrame
        Columns ``start``, ``iteration``, ``seed``, ``mean_max_cosine`` and ``recovered``.
    """
    labels = {"mean_max_cosine": "mean over planted of best |cos|", "recovered": "share with |cos| > 0.99"}
    with style():
        figure, axes_of = panels(2, height=2.8, ratios=(1, 1))
        for axes, column in zip(axes_of, labels, strict=True):
            sns.lineplot(
                curves,
                x="iteration",
                y=column,
                hue="start",
                style="start",
                errorbar=("pi", 100),
                markers=True,
                palette="colorblind",
                legend=axes is axes_of[0],
                ax=axes,
            )
            axes.set(xscale="log", ylim=(0, 1.03), ylabel=labels[column], xlabel="iterations of the fit")
            axes.xaxis.set_major_formatter("{x:.0f}")
        axes_of[0].legend(frameon=False, loc="lower right", title=None)
        sns.despine(figure)
    return figure
