"""Tables 4 and 5 of the post as a picture."""

from collections.abc import Mapping
from typing import Any

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dctlib.paper.plots import COLOURS, panels, style

_DASHES = {"clean": "--", "average": "-", "avg": ":", "svd": "-."}


def ablation(results: Mapping[str, Any]) -> Figure:
    """Scores while one direction is ablated: each source and target direction, and their aggregates.

    Parameters
    ----------
    results : mapping
        ``clean``, a score, and for ``source`` and ``target`` the individual ``scores``, ``v_avg`` and ``v_svd``.
    """
    with style():
        figure, axes_of = panels(2, height=2.9, ratios=(1, 1))
        for axes, side, letter in zip(axes_of, ("source", "target"), "vu", strict=True):
            of = results[side]
            axes.hist(of["scores"], bins=20, color=COLOURS["DCT"], alpha=0.7)
            _flags(axes, letter, {"clean": results["clean"], **{key: of[key] for key in ("average", "v_avg", "v_svd")}})
            axes.set(xlabel=f"mean score, {side} direction ablated", ylabel="directions")
        sns.despine(figure)
    return figure


def _flags(axes: Axes, letter: str, scores: Mapping[str, float]) -> None:
    """An upright line at each score, the leftmost the tallest: its name stands clear of the lines to its right."""
    for place, (key, score) in enumerate(sorted(scores.items(), key=lambda of: -of[1])):
        kind, top = key.removeprefix("v_"), 1.05 + 0.09 * place
        name = kind if kind == key else f"${letter}_\\mathrm{{{kind}}}$"
        at = axes.get_xaxis_transform()
        axes.plot([score, score], [0, top], transform=at, color="0.3", lw=1, ls=_DASHES[kind], clip_on=False)
        label = f" {name} {score:+.1f}".replace("-", "−")
        axes.annotate(label, (score, top), xycoords=at, va="center", fontsize=8, annotation_clip=False)
