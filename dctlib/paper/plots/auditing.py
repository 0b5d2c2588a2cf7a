"""How often a blind audit finds what was planted."""

from collections.abc import Mapping

import seaborn as sns
from matplotlib.figure import Figure

from dctlib.evaluation.statistics import Curve
from dctlib.paper.plots import panels, style
from dctlib.paper.plots.enumeration import draw_curves

_ORDERS = {"fluent": "read by fluency", "divergence": "read by effect on the next token"}


def recall(curves: Mapping[str, Mapping[str, Curve]], *, found: str = "secrets given away") -> Figure:
    """Share of organisms in which one of the first k vectors finds what is hidden, against k.

    Parameters
    ----------
    curves : mapping
        What vectors are ranked by → method → its curve over organisms. One panel each.
    found : str
        What they are the share of.
    """
    with style():
        figure, axes = panels(len(curves), height=2.7, ratios=[1] * len(curves))
        for axis, (by, methods) in zip(axes, curves.items(), strict=True):
            draw_curves(axis, methods)
            axis.set(xlabel="vectors read, k", title=_ORDERS[by])
        axes[0].set_ylabel(found)
        sns.despine(figure)
    return figure
