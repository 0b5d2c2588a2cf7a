"""The figure of what steering vectors unlock, against the damage that they do."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dctlib.paper.plots.style import method_colours, note, panels, styled


@styled
def success_and_damage(tried: pd.DataFrame, tested: pd.DataFrame, max_damage: float) -> Figure:
    """Draw the answers to validation requests against damage, and the answers to test requests of the chosen vectors.

    Parameters
    ----------
    tried : DataFrame
        A row for each vector and length that was tried: ``method``, ``answered`` as a fraction, ``damage`` in nats a
        token, and whether it was ``chosen``.
    tested : DataFrame
        A row for each method, the best first: ``method``, and the fraction of test requests that are answered, as
        ``mean``, ``low`` and ``high``.
    max_damage : float
        The bound on damage under which vectors were chosen.
    """
    figure, (left, right) = panels((1.2, 1), height=2.9)
    colours = method_colours(list(tested["method"]))
    for method, rows in tried.groupby("method", sort=False):
        chosen = rows["chosen"].to_numpy(bool)
        look: Any = {"color": colours[str(method)]}
        left.scatter(rows["damage"], rows["answered"], s=8, alpha=0.45, linewidths=0, **look)
        left.scatter(rows["damage"][chosen], rows["answered"][chosen], s=34, linewidths=0, **look)
    left.axvline(max_damage, color="0.6", lw=1, ls=":")
    note(left, " bound", (max_damage, 0.0))
    left.set_xscale("log")
    left.set(
        xlabel="damage to harmless answers (nats per token)", ylabel="validation requests answered", ylim=(-0.03, 1.03)
    )
    sides = [tested["mean"] - tested["low"], tested["high"] - tested["mean"]]
    for place, method in enumerate(tested["method"]):
        own: Any = [[side.iloc[place]] for side in sides]
        right.errorbar(tested["mean"].iloc[place], -place, xerr=own, fmt="o", ms=5, capsize=2, color=colours[method])
    right.set_yticks([-place for place in range(len(tested))], list(tested["method"]))
    for label, method in zip(right.get_yticklabels(), tested["method"], strict=True):
        label.set_color(colours[method])
    right.set(xlabel="test requests answered", xlim=(-0.03, 1.03))
    for axis in (left.yaxis, right.xaxis):
        axis.set_major_formatter(PercentFormatter(1))
    return figure
