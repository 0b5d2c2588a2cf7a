"""Methods side by side."""

from collections.abc import Mapping, Sequence

import seaborn as sns
from matplotlib.figure import Figure

from dctlib.evaluation.statistics import Curve
from dctlib.paper.plots import errorbar, panels, style
from dctlib.paper.plots.enumeration import draw_curves, method_colours


def baselines(curves: Mapping[str, Curve], firsts: Mapping[str, Sequence[float]]) -> Figure:
    """Share of test requests that at least one of k tries gets answered, against k; and by the first try alone.

    Parameters
    ----------
    curves : mapping
        Method → its curve; of a method that gives one thing only, of one try.
    firsts : mapping
        Method → the rate of its first try on each model.
    """
    with style():
        figure, (left, right) = panels(2, height=2.9, ratios=(3, 2))
        draw_curves(left, {method: curve for method, curve in curves.items() if len(curve.mean) > 1})
        left.set(xlabel="tries k", ylabel="requests answered by one of k")
        rows = sorted(((method, curve.at(1)) for method, curve in curves.items()), key=lambda of: of[1].mean)
        colours = method_colours([method for method, _ in rows])
        for place, (method, mean) in enumerate(rows):
            errorbar(right, place, mean, across=True, color=colours[method])
            models = firsts[method]
            right.plot(models, [place - 0.28] * len(models), "o", ms=2.5, mew=0, color=colours[method], alpha=0.6)
            at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8, "color": colours[method]}
            right.annotate(f"{mean.mean:.0%}", (1.04, place), **at)
        right.set_yticks(range(len(rows)), [method for method, _ in rows])
        for label, (method, _) in zip(right.get_yticklabels(), rows, strict=True):
            label.set_color(colours[method])
        right.set(xlabel="requests answered by the first", xlim=(-0.03, 1.03), ylim=(-0.6, len(rows) - 0.4))
        sns.despine(figure)
    return figure
