"""What gets past a circuit breaker."""

from collections.abc import Mapping, Sequence

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dctlib.metrics import interval
from dctlib.plots import COLOURS, errorbar, panels, style


def circuit_breaker(scan: pd.DataFrame, test: Mapping[str, Sequence[bool]]) -> Figure:
    """Attack success by source layer and multiplier on validation, and of each method's best on test.

    Parameters
    ----------
    scan : DataFrame
        Columns ``method``, ``source``, ``multiplier``, ``success`` (a fraction of 1) and ``score``; those of DCT
        vectors are drawn, several a cell.
    test : mapping
        Method → whether each test request was answered; the first is drawn as clean.
    """
    with style():
        of_dct = scan[scan["method"] == "DCT"]
        figure, axes = panels(3, height=2.7, ratios=(1, 1, 1.1))
        for panel, column, title, look in (
            (axes[0], "score", "score", {"center": 0, "cmap": "vlag", "fmt": "+.0f"}),
            (axes[1], "success", "attack success", {"vmin": 0, "vmax": 1, "cmap": "rocket_r", "fmt": ".0%"}),
        ):
            table = of_dct.pivot_table(index="multiplier", columns="source", values=column, aggfunc="max")
            sns.heatmap(table, annot=True, cbar=False, square=False, ax=panel, annot_kws={"fontsize": 8}, **look)
            panel.set(title=f"{title}, validation", xlabel="source layer s", ylabel="multiplier of R")
        for place, (label, verdicts) in enumerate(test.items()):
            colour = COLOURS["DCT"] if label == "DCT" else COLOURS["clean"] if not place else COLOURS["random"]
            errorbar(axes[2], place, interval([float(v) for v in verdicts]), color=colour)
        axes[2].set_xticks(range(len(test)), list(test), rotation=30, ha="right")
        axes[2].set(title="test", ylabel="attack success", ylim=(-0.03, 1.03), xlim=(-0.5, len(test) - 0.5))
        sns.despine(ax=axes[2])
    return figure
