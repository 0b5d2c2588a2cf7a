"""What a password-locked model can be made to show without the password."""

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dctlib.metrics import interval
from dctlib.plots import COLOURS, errorbar, panels, style


def password_locked(validation: Mapping[str, Sequence[float]], test: Mapping[str, Sequence[bool]]) -> Figure:
    """Accuracy of every vector on validation questions, and of the chosen ones on test questions.

    Parameters
    ----------
    validation : mapping
        ``DCT`` and ``random`` → the accuracy of each vector.
    test : mapping
        Condition → whether each test question was solved.
    """
    with style():
        figure, (left, right) = panels(2, height=2.7, ratios=(1.2, 1))
        top = max(0.1, *(max(values) for values in validation.values()))
        bins = np.linspace(0, top, 17)
        bins = np.array([-1.0, 1e-9, *bins[1:-1], top + 1e-9])  # those that solve nothing have a bar of their own
        for label, values in validation.items():
            shares = np.histogram(values, bins)[0] / len(values)
            places = [-(top / 16) / 2, *((np.maximum(bins[1:-1], 0) + bins[2:]) / 2)]
            left.bar(places, shares, top / 18, color=COLOURS[label], alpha=0.6, label=f"{label} ({len(values)})")
        left.legend(frameon=False)
        left.set(xlabel="accuracy on validation questions (left bar: none)", ylabel="share of vectors")
        left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for place, (label, solved) in enumerate(test.items()):
            colour = (
                COLOURS["DCT"] if label.startswith("steered") else COLOURS["random"] if label == "random" else "0.3"
            )
            mean = interval([float(s) for s in solved])
            errorbar(right, place, mean, color=colour)
            right.annotate(
                f"{mean.mean:.0%}", (place, mean.mean), xytext=(6, 2), textcoords="offset points", color=colour
            )
        right.set_xticks(range(len(test)), list(test), rotation=20)
        right.set(ylabel="accuracy on test questions", ylim=(-0.03, 1.05), xlim=(-0.5, len(test) - 0.3))
        right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        sns.despine(figure)
    return figure
