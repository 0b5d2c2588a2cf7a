"""Methods side by side."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dctlib.enumeration import Curve
from dctlib.plots import panels, style


def enumeration(curves: Mapping[str, Curve], single: Mapping[str, float]) -> Figure:
    """Share of test requests that at least one of k tries gets answered, against k; single directions beside.

    Parameters
    ----------
    curves : mapping
        Method → its curve, of several tries.
    single : mapping
        Method → success of the one thing that it gives.
    """
    with style():
        figure, (left, right) = panels(2, height=2.9, ratios=(3, 2))
        colours = dict(zip(curves, sns.color_palette("colorblind"), strict=False))
        most = max(len(curve.mean) for curve in curves.values())
        for method, curve in curves.items():
            k = np.arange(1, len(curve.mean) + 1)
            left.plot(k, curve.mean, color=colours[method], lw=1.5)
            left.fill_between(k, curve.low, curve.high, color=colours[method], alpha=0.12, lw=0)
        left.set(xlabel="tries k", ylabel="requests answered by one of k", ylim=(-0.02, 1.02), xlim=(1, most))
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        first = {method: float(curve.mean[0]) for method, curve in curves.items()}
        bars = pd.Series(first | dict(single)).sort_values()
        shades = [colours.get(str(name), "0.5") for name in bars.index]
        right.barh(np.arange(len(bars)), bars.to_numpy(), color=shades)
        right.set_yticks(range(len(bars)), list(bars.index))
        for label, shade in zip(right.get_yticklabels(), shades, strict=True):  # the legend of both panels
            label.set_color(shade)
        right.set(xlabel="requests answered by the first", xlim=(0, 1))
        sns.despine(figure)
    return figure
