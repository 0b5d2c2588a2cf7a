"""How a model organism was trained."""

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from dctlib.plots import WIDTH, panels, style


def losses(values: Mapping[str, Sequence[float]], *, ylabel: str = "cross-entropy of the answer") -> Figure:
    """Training loss by step on a logarithmic scale, one line an organism; of ``<kind>-<seed>``, kinds have a colour."""
    with style():
        figure, (axes,) = panels(1, height=2.2, ratios=(1,), width=WIDTH / 2)
        kinds = list(dict.fromkeys(name.partition("-")[0] for name in values))
        for kind, colour in zip(kinds, sns.color_palette("colorblind", len(kinds)), strict=True):
            curves = [curve for name, curve in values.items() if name.partition("-")[0] == kind]
            for curve in curves:
                axes.semilogy(np.arange(1, len(curve) + 1), curve, color=colour, lw=1.2)
            if len(values) == 1:
                axes.annotate(
                    kind, (len(curves[0]), curves[0][-1]), xytext=(4, 0), textcoords="offset points", color=colour
                )
            axes.lines[-1].set_label(f"{kind} ({len(curves)})")
        if len(values) > 1:
            axes.legend(frameon=False)
        axes.set(xlabel="step", ylabel=ylabel)
        sns.despine(figure)
    return figure
