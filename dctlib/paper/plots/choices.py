"""What each choice behind a fit is worth."""

from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dctlib.paper.plots import COLOURS, WIDTH, panels, style

_SYMBOLS = {"nonlinearity": "λ", "horizon": "t − s"}


def choices(found: pd.DataFrame, *, usual: str = "reference", floor: str = "random") -> Figure:
    """Test score of the best vector: a dot a seed and a bar at their mean, one row a variant, one band a choice.

    Parameters
    ----------
    found : DataFrame
        Columns ``choice`` (what was changed), ``value`` (to what, as text), ``seed`` and ``score``, NaN where the
        map has no scale. The variants of a choice first appear one after the other.
    usual : str
        The choice whose mean every other is held to.
    floor : str
        The choice drawn as random vectors.
    """
    with style():
        variants: Any = list(found.groupby(["choice", "value"], sort=False)["score"])
        figure, (axes,) = panels(1, height=0.8 + 0.24 * len(variants), ratios=(1,), width=0.8 * WIDTH)
        names, seen = [], []
        for place, ((choice, value), scores) in enumerate(variants):
            colour = COLOURS["random"] if choice == floor else "0.2" if choice == usual else COLOURS["DCT"]
            axes.scatter(scores, [place] * len(scores), s=16, color=colour, alpha=0.6, linewidths=0)
            axes.plot([scores.mean()], [place], "|", color=colour, ms=13, mew=2)
            names.append(choice if choice in (usual, floor) else f"{_SYMBOLS.get(choice, choice)}: {value}")
            if missing := int(scores.isna().sum()):
                note = "no scale" if missing == len(scores) else f"no scale for {missing} of {len(scores)}"
                axes.annotate(note, (0.02, place), xycoords=("axes fraction", "data"), va="center", color="0.4")
            if choice == usual:
                axes.axvline(scores.mean(), color="0.6", lw=0.8, ls=":", zorder=0)
            if choice not in seen:
                seen.append(choice)
            if len(seen) % 2:  # a band behind every other choice
                axes.axhspan(place - 0.5, place + 0.5, color="0.95", zorder=-1, lw=0)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="score of the best vector, test", ylim=(len(names) - 0.5, -0.5))
        sns.despine(figure)
    return figure
