"""How a model organism was trained."""

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from dctlib.plots import WIDTH, panels, style


def losses(values: Mapping[str, Sequence[float]], *, ylabel: str = "cross-entropy of the answer") -> Figure:
    """Training loss by step, one line an organism, on a logarithmic scale."""
    with style():
        figure, (axes,) = panels(1, height=2.2, ratios=(1,), width=WIDTH / 2)
        for (label, curve), colour in zip(values.items(), sns.color_palette("colorblind"), strict=False):
            axes.semilogy(np.arange(1, len(curve) + 1), curve, color=colour, lw=1.2)
            axes.annotate(label, (len(curve), curve[-1]), xytext=(4, 0), textcoords="offset points", color=colour)
        axes.set(xlabel="step", ylabel=ylabel)
        sns.despine(figure)
    return figure
