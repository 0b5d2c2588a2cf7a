"""What gets past a circuit breaker."""

from collections.abc import Mapping

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dctlib.evaluation.statistics import Interval
from dctlib.paper.plots import COLOURS, WIDTH, errorbar, style

_LOOKS = {
    "score": ("score", lambda score: f"{round(score):+d}".replace("-", "−"), {"cmap": "vlag"}),
    "success": ("attack success", "{:.0%}".format, {"cmap": "rocket_r"}),
}
_COLOURS = {"none": COLOURS["clean"], "DCT": COLOURS["DCT"], "random": COLOURS["random"]}


def circuit_breaker(scan: pd.DataFrame, test: Mapping[str, Interval]) -> Figure:
    """Attack success by source layer and multiplier on validation, and of each method's best on test.

    Parameters
    ----------
    scan : DataFrame
        Columns ``method``, ``source``, ``multiplier``, ``success`` (a fraction of 1) and ``score``. The best of each
        cell is drawn, of DCT vectors and of random ones.
    test : mapping
        Method, or ``none`` → the share of test requests that were answered.
    """
    with style():
        figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
        rows = [[f"{method} {column}" for column in _LOOKS] for method in ("DCT", "random")]
        axes = figure.subplot_mosaic([[*row, "test"] for row in rows], width_ratios=(1, 1, 1.1))  # pyright: ignore[reportArgumentType]
        most = scan["score"].abs().max()  # one colour means one score, of DCT and of random vectors
        limits = {"score": {"vmin": -most, "vmax": most}, "success": {"vmin": 0, "vmax": 1}}
        for method, of in scan[scan["method"].isin(["DCT", "random"])].groupby("method"):
            for column, (title, text, look) in _LOOKS.items():
                panel = axes[f"{method} {column}"]
                table = of.pivot_table(index="multiplier", columns="source", values=column, aggfunc="max")
                written = {"annot": table.map(text), "fmt": "", "annot_kws": {"fontsize": 8}}
                sns.heatmap(table, cbar=False, ax=panel, **written, **look, **limits[column])
                panel.set(title=f"{title}, {method}", xlabel="source layer s" * (method == "random"), ylabel="")
                panel.set_yticklabels([f"{multiplier:g} R" for multiplier in table.index], rotation=0)
        figure.supylabel("length of the vector", fontsize="medium")
        for place, (label, mean) in enumerate(test.items()):
            colour = _COLOURS.get(label, (0.25,) * 3)
            errorbar(axes["test"], place, mean, color=colour)
            axes["test"].annotate(f" {mean.mean:.0%}", (place, mean.mean), va="bottom", fontsize=8, color=colour)
        axes["test"].set_xticks(range(len(test)), [label.replace("difference of ", "") for label in test], fontsize=8)
        axes["test"].set(title="attack success, test")
        axes["test"].set(ylim=(-0.03, 1.03), xlim=(-0.5, len(test) - 0.2))
        axes["test"].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        sns.despine(ax=axes["test"])
    return figure
