"""Tables 4 and 5 of the post as a picture."""

from collections.abc import Mapping
from typing import Any

import seaborn as sns
from matplotlib.figure import Figure

from dctlib.plots import COLOURS, panels, style


def ablation(results: Mapping[str, Any]) -> Figure:
    """Scores while one direction is ablated: each source and target direction, and their aggregates.

    Parameters
    ----------
    results : mapping
        ``clean``, a score, and for ``source`` and ``target`` the individual ``scores``, ``v_avg`` and ``v_svd``.
    """
    with style():
        figure, axes_of = panels(2, height=2.6, ratios=(1, 1))
        for axes, side, letter in zip(axes_of, ("source", "target"), "vu", strict=True):
            axes.hist(results[side]["scores"], bins=20, color=COLOURS["DCT"], alpha=0.7)
            marks = {
                "clean": results["clean"],
                "average": results[side]["average"],
                f"${letter}_\\mathrm{{avg}}$": results[side]["v_avg"],
                f"${letter}_\\mathrm{{svd}}$": results[side]["v_svd"],
            }
            for (name, value), line in zip(marks.items(), ("--", "-", ":", "-."), strict=True):
                axes.axvline(value, color="0.3", lw=1, ls=line, label=f"{name} {value:+.1f}")
            axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
            axes.set(xlabel=f"mean score, {side} direction ablated", ylabel="directions")
        sns.despine(figure)
    return figure
