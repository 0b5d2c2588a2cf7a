"""The same numbers on organisms of several seeds."""

from collections.abc import Mapping, Sequence

import seaborn as sns
from matplotlib.figure import Figure

from dctlib.paper.plots import COLOURS, panels, style


def replicates(sides: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """A dot an organism and a bar at their mean: with a handful of organisms the dots say more than an interval.

    Parameters
    ----------
    sides : mapping
        Title of a panel → name of a number, from the top → its value on each organism.
    """
    with style():
        figure, axes_of = panels(len(sides), height=2.6, ratios=[1] * len(sides))
        for axes, (title, rows) in zip(axes_of, sides.items(), strict=True):
            for place, values in enumerate(rows.values()):
                axes.plot(values, [place] * len(values), "o", ms=4, color=COLOURS["DCT"], alpha=0.6, mew=0)
                axes.vlines(sum(values) / len(values), place - 0.3, place + 0.3, color="0.2", lw=1.5)
            axes.axvline(0, color="0.7", lw=0.8, zorder=0)
            axes.set_yticks(range(len(rows)), list(rows))
            axes.set(xlabel="mean score, test", title=title, ylim=(len(rows) - 0.4, -0.6))
        sns.despine(figure)
    return figure
