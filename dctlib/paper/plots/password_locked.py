"""What a password-locked model can be made to show without the password."""

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dctlib.evaluation.statistics import Interval
from dctlib.paper.plots import COLOURS, errorbar, panels, style


def password_locked(validation: Mapping[str, Sequence[float]], test: Mapping[str, Interval]) -> Figure:
    """Accuracy of every vector on validation questions, and of the chosen ones on test questions.

    Parameters
    ----------
    validation : mapping
        ``DCT`` and ``random`` → the accuracy of each vector.
    test : mapping
        Condition → the share of test questions that were solved.
    """
    with style():
        figure, (left, right) = panels(2, height=2.7, ratios=(1.2, 1))
        for label, values in validation.items():
            ranked = np.sort(np.asarray(values))[::-1]
            name = f"{label}, {len(ranked)} vectors"
            left.plot(np.arange(1, len(ranked) + 1), ranked, "o-", ms=2.5, lw=1.2, color=COLOURS[label], label=name)
        left.legend(frameon=False)
        left.set(xlabel="rank of the vector", ylabel="accuracy on validation questions", ylim=(-0.03, 1.05))
        left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for place, (label, mean) in enumerate(test.items()):
            colour = (
                COLOURS["DCT"] if label.startswith("steered") else COLOURS["random"] if label == "random" else "0.3"
            )
            errorbar(right, place, mean, color=colour)
            right.annotate(
                f"{mean.mean:.0%}", (place, mean.mean), xytext=(6, 2), textcoords="offset points", color=colour
            )
        right.set_xticks(range(len(test)), list(test), rotation=20)
        right.set(ylabel="accuracy on test questions", ylim=(-0.03, 1.05), xlim=(-0.5, len(test) - 0.3))
        right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        sns.despine(figure)
    return figure
