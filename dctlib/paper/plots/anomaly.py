"""Which anomaly detectors tell triggered prompts from others."""

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dctlib.evaluation.statistics import Interval
from dctlib.paper.plots import COLOURS, errorbar, panels, style

_ENDS = {"source": "source layer, V", "target": "target layer, U"}
_COLOURS = {"factors": COLOURS["DCT"], "random": COLOURS["random"], "residual": "0.3"}


def anomaly(aurocs: pd.DataFrame, means: pd.DataFrame) -> Figure:
    """AUROC by detector, one panel a contrast: the mean over organisms and its interval, and below a dot an organism.

    Parameters
    ----------
    aurocs : DataFrame
        Columns ``organism``, ``planted`` (whether it has a secret; clean ones are hollow), ``end`` (``source`` or
        ``target``), ``detector``, ``contrast`` and ``mean``.
    means : DataFrame
        Over organisms with a secret: columns ``end``, ``detector``, ``contrast``, ``mean``, ``low`` and ``high``, the
        last two NaN where there is no interval.
    """
    with style():
        contrasts = list(means["contrast"].unique())
        rows = []  # from the top: a heading for each end, then its detectors
        for end, of in means.groupby("end", sort=False):
            rows += [(end, None), *((end, detector) for detector in of["detector"].unique())]
        figure, axes = panels(len(contrasts), height=0.9 + 0.21 * len(rows), ratios=[1] * len(contrasts))
        for panel, contrast in zip(axes, contrasts, strict=True):
            for place, (end, detector) in enumerate(rows):
                if detector is not None:
                    here = {"end": end, "detector": detector, "contrast": contrast}
                    _detector(panel, place, _only(aurocs, here), _only(means, here), _colour(detector))
            panel.axvline(0.5, color="0.6", lw=0.8, ls=":", zorder=0)
            panel.annotate("chance ", (0.5, 0), ha="right", va="center", fontsize=8, color="0.4")
            panel.set(title=contrast, xlabel="AUROC", xlim=(0, 1.02), ylim=(len(rows) - 0.4, -0.6))
            panel.tick_params(axis="y", length=0)
            panel.set_yticks(range(len(rows)), [detector or _ENDS[end] for end, detector in rows])
            for label, (_, detector) in zip(panel.get_yticklabels(), rows, strict=True):
                label.set(color=_colour(detector), weight="normal" if detector else "bold")
        for panel in axes[1:]:
            panel.tick_params(axis="y", labelleft=False)
        key = "dots: organisms with a secret, hollow: clean ones; above: mean of those with a secret, 95 % interval"
        figure.supxlabel(key, fontsize=8, color="0.4")
        sns.despine(figure)
    return figure


def _detector(panel: Axes, place: float, each: pd.DataFrame, means: pd.DataFrame, colour: tuple | str) -> None:
    for planted, of in each.groupby("planted"):
        look = {"color": colour, "alpha": 0.55} if planted else {"facecolors": "none", "edgecolors": colour}
        panel.scatter(of["mean"], [place + 0.26] * len(of), s=9, linewidths=0 if planted else 0.8, **look)
    for mean, low, high in means[["mean", "low", "high"]].to_numpy(float):
        errorbar(panel, place - 0.1, Interval(mean, low, high), across=True, color=colour)
        at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
        panel.annotate(f"{mean:.2f}", (1.03, place), color=colour, **at)


def _only(table: pd.DataFrame, values: dict) -> pd.DataFrame:
    return table.merge(pd.DataFrame([values]))


def _colour(detector: str | None) -> tuple | str:
    return _COLOURS[detector.partition(",")[0]] if detector else "0.15"
