"""Figure 2 of the post, and the scores of vectors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from dctlib.evaluation.statistics import interval
from dctlib.paper.plots import COLOURS, errorbar, label_ends, panels, style


def training_curves(record: Mapping[int, Mapping[str, Any]]) -> Figure:
    """Figure 2: causal importance per factor by iteration, one line a width; and what each width costs.

    Parameters
    ----------
    record : mapping
        Width m → ``objective``, Σ_l ⟨u_l, Δ_R(v_l)⟩ at the start of each iteration, and ``seconds``, the wall time.
    """
    with style():
        figure, (left, right) = panels(2, height=2.8, ratios=(3, 2))
        colours = sns.color_palette("viridis_r", len(record) + 1)[1:]
        ends = []
        for (width, fit), colour in zip(record.items(), colours, strict=True):
            per_factor = np.asarray(fit["objective"]) / width
            left.plot(np.arange(len(per_factor)), per_factor, color=colour, lw=1.5)
            ends.append((float(per_factor[-1]), f"m = {width}", colour))
        label_ends(left, len(next(iter(record.values()))["objective"]) - 1, ends)
        left.set(xlabel="iteration", ylabel=r"causal importance per factor", ylim=(0, None))
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        widths = np.array(list(record))
        times = np.array([fit["seconds"] for fit in record.values()])
        right.loglog(widths, times, "o-", color=COLOURS["DCT"], lw=1.5, ms=4)
        right.loglog(widths, times[-1] * widths / widths[-1], ":", color="0.5", lw=1)
        right.set(xlabel="width m", ylabel="seconds a fit")
        right.set_xticks(widths, [str(width) for width in widths], rotation=45)
        right.set_title("dotted: proportional to m", loc="left", color="0.4", fontsize=8)
        right.minorticks_off()
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter("{x:g}")
        sns.despine(figure)
    return figure


def scores(validation: Mapping[str, Sequence[float]], test: Mapping[str, Sequence[float]]) -> Figure:
    """Jailbreak scores: of all vectors on validation instructions, and of the chosen ones on each test instruction.

    Parameters
    ----------
    validation : mapping
        Label ("DCT", "random") → one mean score a vector.
    test : mapping
        Label ("clean", "random", "DCT") → one score an instruction; the mean's 95 % interval is drawn beside.
    """
    with style():
        figure, (left, right) = panels(2, height=2.8, ratios=(1, 1))
        for label, values in validation.items():
            ranked = np.sort(np.asarray(values))[::-1]
            left.plot(np.arange(1, len(ranked) + 1), ranked, color=COLOURS[label], lw=1.5)
            left.annotate(
                label,
                (len(ranked), ranked[-1]),
                xytext=(4, 0),
                textcoords="offset points",
                color=COLOURS[label],
            )
        left.axhline(0, color="0.8", lw=0.8, zorder=0)
        left.set(xlabel="rank of the vector", ylabel="mean score, validation")
        generator = np.random.default_rng(0)
        for place, (label, values) in enumerate(test.items()):
            jitter = place + generator.uniform(-0.18, 0.18, len(values))
            right.scatter(jitter, values, s=6, alpha=0.5, color=COLOURS[label], linewidths=0)
            errorbar(right, place + 0.32, interval(values), color=COLOURS[label])
        right.axhline(0, color="0.8", lw=0.8, zorder=0)
        right.set_xticks(range(len(test)), [label if label == "clean" else f"best {label}" for label in test])
        right.set(ylabel="score, each test instruction", xlim=(-0.5, len(test) - 0.3))
        sns.despine(figure)
    return figure
