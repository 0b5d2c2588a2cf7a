"""Refusals of real chat models, and scores of steering vectors on them."""

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dctlib.evaluation.statistics import Interval
from dctlib.paper.plots import COLOURS, errorbar, panels, style

_COLOURS = {"unsteered": COLOURS["clean"], "random": COLOURS["random"], "DCT": COLOURS["DCT"]}


def real_models(
    refused: Mapping[str, Mapping[str, Interval]],
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    clean_scores: Mapping[str, float],
) -> Figure:
    """Draw the share of test requests refused, and the ranked validation scores: one row and one panel a model.

    Parameters
    ----------
    refused : mapping
        Model → ``unsteered``, ``random`` and ``DCT`` → the share of test requests that it refuses.
    scores : mapping
        Model → ``random`` and ``DCT`` → one mean validation score a vector.
    clean_scores : mapping
        Model → the mean validation score without a vector.
    """
    with style():
        figure, (left, *others) = panels(1 + len(scores), height=2.6, ratios=[1.2] + [1] * len(scores))
        for row, (_, rates) in enumerate(refused.items()):
            shifts = np.linspace(-0.22, 0.22, len(rates))
            for shift, (name, rate) in zip(shifts, rates.items(), strict=True):
                label = name if row == 0 else None
                errorbar(left, row + shift, rate, across=True, color=_COLOURS[name], label=label)
        left.set_yticks(range(len(refused)), list(refused))
        left.set(xlabel="test requests refused", xlim=(-0.03, 1.03), ylim=(len(refused) - 0.5, -0.5))
        left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0)
        for axes, (model, kinds) in zip(others, scores.items(), strict=True):
            for kind, values in kinds.items():
                ranked = np.sort(np.asarray(values))[::-1]
                axes.plot(np.arange(1, len(ranked) + 1), ranked, color=_COLOURS[kind], lw=1.5)
            axes.axhline(clean_scores[model], color=_COLOURS["unsteered"], lw=1, ls=":")
            axes.axhline(0, color="0.8", lw=0.8, zorder=0)
            axes.set(title=model, xlabel="rank of the vector")
        others[0].set_ylabel("mean score, validation")
        sns.despine(figure)
    return figure
