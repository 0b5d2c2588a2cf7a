"""What the faults of the published code cost."""

from collections.abc import Mapping

import seaborn as sns
from matplotlib.figure import Figure

from dctlib.evaluation.statistics import Interval
from dctlib.paper.plots import COLOURS, errorbar, panels, style


def faults(found: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """What each fault costs: the mean score and its interval done right and with the fault, one row a fault."""
    with style():
        figure, (axes,) = panels(1, height=0.42 * len(found) + 0.9, ratios=(1,))
        for place, both in enumerate(reversed(list(found.values()))):
            for side, colour, shift in (("right", COLOURS["DCT"], 0.12), ("wrong", COLOURS["random"], -0.12)):
                label = {"right": "as written in the post", "wrong": "with the fault"}[side] if not place else None
                errorbar(axes, place + shift, both[side], across=True, color=colour, label=label)
        axes.axvline(0, color="0.8", lw=0.8, zorder=0)
        axes.set_yticks(range(len(found)), list(found)[::-1])
        axes.set(xlabel="mean score on test instructions, 95 % interval", ylim=(-0.6, len(found) - 0.4))
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        sns.despine(figure)
    return figure
