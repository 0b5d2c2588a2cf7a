"""How often a blind audit finds what was planted."""

from collections.abc import Mapping

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dctlib.enumeration import Curve
from dctlib.plots import label_ends, panels, style

_ORDERS = {"fluent": "read by fluency", "divergence": "read by effect on the next token"}


def recall(curves: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """Share of organisms whose secret one of the first k vectors gives away, against k.

    Parameters
    ----------
    curves : mapping
        What vectors are ranked by → method → its curve over organisms. One panel each.
    """
    with style():
        figure, axes = panels(len(curves), height=2.7, ratios=[1] * len(curves))
        for axis, (by, methods) in zip(axes, curves.items(), strict=True):
            ends, most = [], max(len(curve.mean) for curve in methods.values())
            for colour, (method, curve) in zip(sns.color_palette("colorblind"), methods.items(), strict=False):
                k = np.arange(1, len(curve.mean) + 1)
                axis.plot(k, curve.mean, color=colour, lw=1.5)
                axis.fill_between(k, curve.low, curve.high, color=colour, alpha=0.1, lw=0)
                ends.append((float(curve.mean[-1]), method, colour))
            axis.set(xlabel="vectors read, k", ylim=(-0.02, 1.02), xlim=(1, most), title=_ORDERS[by])
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            label_ends(axis, float(most), ends)
        axes[0].set_ylabel("secrets given away")
        sns.despine(figure)
    return figure
