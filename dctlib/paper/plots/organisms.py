"""How a model organism was trained."""

from collections.abc import Sequence

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dctlib.paper.plots import COLOURS, WIDTH, panels, style


def losses(values: Sequence[float], *, ylabel: str = "cross-entropy (nats)") -> Figure:
    """Training loss by step on a logarithmic scale."""
    with style():
        figure, (axes,) = panels(1, height=2.2, ratios=(1,), width=WIDTH / 2)
        axes.plot(np.arange(1, len(values) + 1), values, color=COLOURS["DCT"], lw=1.2)
        by_step(axes, ylabel)
        sns.despine(figure)
    return figure


def by_step(axes: Axes, ylabel: str) -> None:
    """Losses upright, on a logarithmic scale with plain numbers, against the step."""
    axes.set(yscale="log", xlabel="step", ylabel=ylabel)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
