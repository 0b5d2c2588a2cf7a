"""Figures from arrays. Nothing here touches a model or opens a window."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor

from dctlib.metrics import Interval, interval
from dctlib.store import whole

WIDTH = 7.0
"""Inches: the text width of a page."""

_COLOURS: dict[str, tuple] = dict(zip(["DCT", "random", "clean"], sns.color_palette("colorblind"), strict=False))


@contextmanager
def _style() -> Iterator[None]:
    settings: Any = {
        **sns.axes_style("ticks"),
        **sns.plotting_context("paper"),
        "svg.hashsalt": "dctlib",
        "font.size": 9,
    }
    with mpl.rc_context(settings):
        yield


def save_figure(figure: Figure, stem: str | Path) -> Figure:
    """Write <stem>.png and <stem>.svg, each whole or not at all, with no date inside, and return the figure."""
    options: dict[str, Any] = {".png": {"dpi": 200}, ".svg": {"metadata": {"Date": None}}}
    for suffix in options:
        with _style(), whole(Path(stem).with_suffix(suffix)) as partial:
            figure.savefig(partial, bbox_inches="tight", **options[suffix])
    return figure


def training_curves(record: Mapping[int, Mapping[str, Any]]) -> Figure:
    """Figure 2: causal importance per factor by iteration, one line a width; and what each width costs.

    Parameters
    ----------
    record : mapping
        Width m → ``objective``, Σ_l ⟨u_l, Δ_R(v_l)⟩ at the start of each iteration, and ``seconds``, the wall time.
    """
    with _style():
        figure, (left, right) = _panels(2, height=2.8, ratios=(3, 2))
        colours = sns.color_palette("viridis_r", len(record) + 1)[1:]
        ends = []
        for (width, fit), colour in zip(record.items(), colours, strict=True):
            per_factor = np.asarray(fit["objective"]) / width
            left.plot(np.arange(len(per_factor)), per_factor, color=colour, lw=1.5)
            ends.append((float(per_factor[-1]), f"m = {width}", colour))
        _label_ends(left, len(next(iter(record.values()))["objective"]) - 1, ends)
        left.set(xlabel="iteration", ylabel=r"causal importance per factor", ylim=(0, None))
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        widths = np.array(list(record))
        times = np.array([fit["seconds"] for fit in record.values()])
        right.loglog(widths, times, "o-", color=_COLOURS["DCT"], lw=1.5, ms=4)
        right.loglog(widths, times[-1] * widths / widths[-1], ":", color="0.5", lw=1)
        right.annotate(
            "proportional to m",
            (widths[-2:][0], times[-1] * widths[-2:][0] / widths[-1]),
            xytext=(6, -18),
            textcoords="offset points",
            color="0.4",
            fontsize=8,
        )
        right.set(xlabel="width m", ylabel="seconds a fit")
        right.set_xticks(widths, [str(width) for width in widths], rotation=45)
        right.minorticks_off()
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
    with _style():
        figure, (left, right) = _panels(2, height=2.8, ratios=(1, 1))
        for label, values in validation.items():
            ranked = np.sort(np.asarray(values))[::-1]
            left.plot(np.arange(1, len(ranked) + 1), ranked, color=_COLOURS[label], lw=1.5)
            left.annotate(
                label,
                (len(ranked), ranked[-1]),
                xytext=(4, 0),
                textcoords="offset points",
                color=_COLOURS[label],
            )
        left.axhline(0, color="0.8", lw=0.8, zorder=0)
        left.set(xlabel="rank of the vector", ylabel="mean score, validation")
        generator = np.random.default_rng(0)
        for place, (label, values) in enumerate(test.items()):
            jitter = place + generator.uniform(-0.18, 0.18, len(values))
            right.scatter(jitter, values, s=6, alpha=0.5, color=_COLOURS[label], linewidths=0)
            mean = interval(values)
            right.errorbar(
                place + 0.32,
                mean.mean,
                [[mean.mean - mean.low], [mean.high - mean.mean]],
                fmt="o",
                ms=4,
                color=_COLOURS[label],
                capsize=2,
            )
        right.axhline(0, color="0.8", lw=0.8, zorder=0)
        right.set_xticks(range(len(test)), [label if label == "clean" else f"best {label}" for label in test])
        right.set(ylabel="score, each test instruction", xlim=(-0.5, len(test) - 0.3))
        sns.despine(figure)
    return figure


def losses(values: Mapping[str, Sequence[float]]) -> Figure:
    """Training loss by step, one line an organism, on a logarithmic scale."""
    with _style():
        figure, (axes,) = _panels(1, height=2.2, ratios=(1,), width=WIDTH / 2)
        for (label, curve), colour in zip(values.items(), sns.color_palette("colorblind"), strict=False):
            axes.semilogy(np.arange(1, len(curve) + 1), curve, color=colour, lw=1.2)
            axes.annotate(label, (len(curve), curve[-1]), xytext=(4, 0), textcoords="offset points", color=colour)
        axes.set(xlabel="step", ylabel="cross-entropy of the answer")
        sns.despine(figure)
    return figure


def recovery_curves(curves: pd.DataFrame) -> Figure:
    """Recovery of planted factors by iteration, one line a start, with the spread over seeds.

    Parameters
    ----------
    curves : DataFrame
        Columns ``start``, ``iteration``, ``seed``, ``mean_max_cosine`` and ``recovered``.
    """
    labels = {"mean_max_cosine": "mean over planted of best |cos|", "recovered": "share with |cos| > 0.99"}
    with _style():
        figure, panels = _panels(2, height=2.8, ratios=(1, 1))
        for axes, column in zip(panels, labels, strict=True):
            sns.lineplot(
                curves,
                x="iteration",
                y=column,
                hue="start",
                style="start",
                errorbar=("pi", 100),
                markers=True,
                palette="colorblind",
                legend=axes is panels[0],
                ax=axes,
            )
            axes.set(xscale="log", ylim=(0, 1.03), ylabel=labels[column], xlabel="iterations of the fit")
            axes.xaxis.set_major_formatter("{x:.0f}")
        panels[0].legend(frameon=False, loc="lower right", title=None)
        sns.despine(figure)
    return figure


def faults(found: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """What each fault costs: the mean score and its interval done right and with the fault, one row a fault."""
    with _style():
        figure, (axes,) = _panels(1, height=0.42 * len(found) + 0.9, ratios=(1,))
        for place, both in enumerate(reversed(list(found.values()))):
            for side, colour, shift in (("right", _COLOURS["DCT"], 0.12), ("wrong", _COLOURS["random"], -0.12)):
                mean = both[side]
                axes.errorbar(
                    mean.mean,
                    place + shift,
                    xerr=[[mean.mean - mean.low], [mean.high - mean.mean]],
                    fmt="o",
                    ms=4,
                    capsize=2,
                    color=colour,
                    label={"right": "as written in the post", "wrong": "with the fault"}[side] if not place else None,
                )
        axes.axvline(0, color="0.8", lw=0.8, zorder=0)
        axes.set_yticks(range(len(found)), list(found)[::-1])
        axes.set(xlabel="mean score on test instructions, 95 % interval", ylim=(-0.6, len(found) - 0.4))
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        sns.despine(figure)
    return figure


def multiplicity(V: Tensor, each: Sequence[float], aggregates: Mapping[str, float]) -> Figure:
    """|cosine| of every pair of directions, alike ones beside each other, and their scores beside their aggregates'.

    Parameters
    ----------
    V : Tensor, (m, d)
        Unit directions.
    each : sequence of float
        The score of each direction.
    aggregates : mapping
        Name of an aggregate → its score.
    """
    with _style():
        figure, (left, right) = _panels(2, height=2.9, ratios=(1, 1))
        rows = V.double().cpu().numpy()
        order = leaves_list(linkage(rows, "average", metric="cosine"))
        image = left.imshow(abs(rows[order] @ rows[order].T), vmin=0, vmax=1, cmap="rocket_r")
        left.set(xlabel="direction, clustered", ylabel="direction, clustered")
        figure.colorbar(image, ax=left, label="|cos|", shrink=0.8)
        right.hist(each, bins=20, color=_COLOURS["DCT"], alpha=0.7)
        marks = {"average": sum(each) / len(each), "best": max(each), **aggregates}
        for place, (name, value) in enumerate(marks.items()):
            right.axvline(value, color="0.3", lw=1, ls=["-", "--", ":", "-."][place % 4], label=f"{name} {value:+.1f}")
        right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        right.set(xlabel="mean score, test", ylabel="vectors")
        sns.despine(figure)
    return figure


def ablation(results: Mapping[str, Any]) -> Figure:
    """Scores while one direction is ablated: each source and target direction, and their aggregates.

    Parameters
    ----------
    results : mapping
        ``clean``, a score, and for ``source`` and ``target`` the individual ``scores``, ``v_avg`` and ``v_svd``.
    """
    with _style():
        figure, panels = _panels(2, height=2.6, ratios=(1, 1))
        for axes, side, letter in zip(panels, ("source", "target"), "vu", strict=True):
            axes.hist(results[side]["scores"], bins=20, color=_COLOURS["DCT"], alpha=0.7)
            marks = {
                "clean": results["clean"],
                "average": results[side]["average"],
                f"${letter}_\\mathrm{{avg}}$": results[side]["v_avg"],
                f"${letter}_\\mathrm{{svd}}$": results[side]["v_svd"],
            }
            for (name, value), line in zip(marks.items(), ("--", "-", ":", "-."), strict=True):
                axes.axvline(value, color="0.3", lw=1, ls=line, label=f"{name} {value:+.1f}")
            axes.legend(frameon=False, fontsize=8, loc="best")
            axes.set(xlabel=f"mean score, {side} direction ablated", ylabel="directions")
        sns.despine(figure)
    return figure


def _panels(count: int, *, height: float, ratios: Sequence[float], width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, width_ratios=ratios, squeeze=False)[0])


def _label_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, tuple]]) -> None:
    """Write each line's name at its right end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.075 * (max(high, max(y for y, _, _ in ends)) - min(low, 0))
    last = -np.inf
    for y, label, colour in sorted(ends):
        last = max(y, last + gap)
        axes.annotate(
            label,
            (x, y),
            xytext=(x * 1.03, last),
            textcoords="data",
            color=colour,
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
