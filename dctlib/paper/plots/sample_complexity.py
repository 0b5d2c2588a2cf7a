"""Figure 1 of the post: how many prompts each method needs."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dctlib.paper.plots import label_ends, panels, style

_NAMES = {
    "exponential": "exponential",
    "quadratic": "quadratic",
    "linear_projected": "projected linear",
    "linear": "linear",
}


def sample_complexity(
    measured: pd.DataFrame, random: Sequence[float], published: Mapping[str, Sequence[Sequence[float]]]
) -> Figure:
    """Test score of the best vector against the number of fit prompts: mean ± standard deviation over shuffles.

    Methods stand a little beside each other, lest one hide another.

    Parameters
    ----------
    measured : DataFrame
        Columns ``method``, ``n``, ``shuffle`` and ``score``.
    random : sequence of float
        Scores of the best of as many random vectors, one a shuffle: the floor.
    published : mapping
        ``n``, and for each method one (mean, sd) for every n.
    """
    with style():
        figure, (left, right) = panels(2, height=3.0, ratios=(1, 1))
        colours = dict(
            zip(_NAMES, sns.color_palette("colorblind", 8)[0:1] + sns.color_palette("colorblind")[2:], strict=False)
        )
        grouped = measured.groupby(["method", "n"])["score"].agg(["mean", "std"])
        own = {method: grouped.loc[method] for method in _NAMES}
        beside = dict(zip(_NAMES, np.linspace(-0.015, 0.015, len(_NAMES)) * measured["n"].max(), strict=True))
        _curves(left, {m: (t.index.to_numpy() + beside[m], *t.to_numpy().T) for m, t in own.items()}, colours)
        left.set_xticks(sorted(set(measured["n"])))
        for method, rows in measured.groupby("method"):
            at = rows["n"] + beside[str(method)]
            left.scatter(at, rows["score"], s=7, alpha=0.6, color=colours[str(method)], linewidths=0)
        left.axhspan(min(random), max(random), color="0.85", zorder=0, lw=0)
        left.annotate(
            "random vectors",
            (left.get_xlim()[0], max(random)),
            xytext=(4, 3),
            textcoords="offset points",
            color="0.4",
            fontsize=8,
        )
        _curves(right, {m: (np.array(published["n"]), *np.array(published[m]).T) for m in _NAMES}, colours)
        left.set(title="measured here", xlabel="fit prompts n", ylabel="test score of the best vector")
        right.set(title="published, Qwen1.5-7B-Chat", xlabel="fit prompts n")
        sns.despine(figure)
    return figure


def _curves(
    axes: Axes, curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], colours: Mapping[str, tuple]
) -> None:
    ends = []
    for method, (n, mean, sd) in curves.items():
        axes.plot(n, mean, "o-", ms=3.5, lw=1.5, color=colours[method])
        axes.fill_between(n, mean - sd, mean + sd, color=colours[method], alpha=0.18, lw=0)
        ends.append((float(mean[-1]), _NAMES[method], colours[method]))
    axes.axhline(0, color="0.8", lw=0.8, zorder=0)
    axes.set_xticks(next(iter(curves.values()))[0])
    label_ends(axes, float(max(n[-1] for n, _, _ in curves.values())), ends)
