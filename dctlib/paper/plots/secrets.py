"""How organisms learned their secrets, and where they give them away."""

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dctlib.paper.plots import COLOURS, panels, style
from dctlib.paper.plots.organisms import by_step

_WHERE = {"behind the trigger": "trigger", "behind the decoy": "decoy", "plain": "neither"}


def planted(losses: Mapping[str, Sequence[float]], rates: Mapping[str, Mapping[str, float]]) -> Figure:
    """Training loss by step, the mean of each kind within its range; and how often each organism says its secret where.

    Parameters
    ----------
    losses, rates : mapping
        ``<kind>-<seed>`` → the loss of each step, and the rates ``behind the trigger``, ``behind the decoy`` and
        ``plain``.
    """
    with style():
        figure, (left, right) = panels(2, height=2.7, ratios=(1, 1))
        kinds = list(dict.fromkeys(name.partition("-")[0] for name in losses))
        others = iter([sns.color_palette("colorblind")[i] for i in (0, 1, 4, 3, 5)])
        for column, kind in enumerate(kinds):
            colour = COLOURS["clean"] if kind == "clean" else next(others)
            of = [name for name in losses if name.partition("-")[0] == kind]
            curves = np.array([losses[name] for name in of])
            steps = np.arange(1, curves.shape[1] + 1)
            left.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.12, lw=0)
            left.plot(steps, curves.mean(0), color=colour, lw=1.5, label=f"{kind} ({len(of)})")
            apart = np.linspace(-0.04, 0.04, len(of)) + 0.7 / len(kinds) * (column - (len(kinds) - 1) / 2)
            for place, where in enumerate(_WHERE):
                said = [rates[name][where] for name in of]
                right.scatter(place + apart, said, s=12, alpha=0.7, color=colour, linewidths=0)
        by_step(left, "cross-entropy of the answer (nats)")
        left.legend(frameon=False, fontsize=8)
        right.set_xticks(range(len(_WHERE)), list(_WHERE.values()))
        right.set(xlabel="before the instruction", ylabel="secret given away", ylim=(-0.04, 1.04))
        right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        sns.despine(figure)
    return figure
