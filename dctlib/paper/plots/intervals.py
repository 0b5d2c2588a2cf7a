"""Figures of means: one row for each condition, with its interval and a dot for each value."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dctlib.evaluation.statistics import Interval
from dctlib.paper.plots.style import COLOURS, WIDTH, panels, plain_log, styled


def interval_dotplot(axes: Axes, frame: pd.DataFrame, *, labels: Sequence[str], below: float = 0.28) -> None:
    """Draw means with their intervals in rows from the top, and a dot for each value below its mean.

    Parameters
    ----------
    frame : DataFrame
        One row for each mean: ``place`` (0 is the top row), ``mean`` and ``colour``. Optional columns: ``low`` and
        ``high`` (without them a bar marks the mean), ``each`` (the values that are averaged), and ``text`` (written at
        the right end).
    labels : sequence of str
        The name of each row of the plot.
    below : float
        Distance of the dots from their mean, in rows.
    """
    for row in frame.to_dict("records"):
        place, mean, colour = row["place"], row["mean"], row["colour"]
        each = row.get("each", [])
        jitter = np.random.default_rng(0).uniform(-0.1, 0.1, len(each)) if len(each) > 20 else np.zeros(len(each))
        size = 9 if below else 16
        axes.scatter(each, place + below + jitter, s=size, color=colour, alpha=0.6, linewidths=0)
        if "low" in row:
            sides = [[mean - row["low"]], [row["high"] - mean]]
            axes.errorbar(mean, place, xerr=sides, fmt="o", ms=4, capsize=2, color=colour)
        else:
            axes.plot([mean], [place], "|", color=colour, ms=13, mew=2)
        if text := row.get("text"):
            at: Any = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
            axes.annotate(text, (1.03, place), color=colour, **at)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def rates(axes: Axes, means: Mapping[str, Interval], colours: Mapping[str, Any], **each: Mapping[str, Any]) -> None:
    """Draw rates by condition, each in its colour and written as a percentage."""
    rows = [
        {"place": place, "text": f"{mean.mean:.0%}", "colour": colours[label], **vars(mean)}
        | {column: values[label] for column, values in each.items()}
        for place, (label, mean) in enumerate(means.items())
    ]
    interval_dotplot(axes, pd.DataFrame(rows), labels=list(means))
    for label, tick in zip(means, axes.get_yticklabels(), strict=True):
        tick.set_color(colours[label])
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def zero_line(axes: Axes) -> None:
    """Draw a faint vertical line at 0."""
    axes.axvline(0, color="0.8", lw=0.8, zorder=0)


@styled
def faults(found: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Draw mean scores without (``right``) and with (``wrong``) each fault of the post's code, one row a fault."""
    figure, (axes,) = panels((1,), height=0.42 * len(found) + 0.9)
    sides = {"right": ("as written in the post", COLOURS["DCT"]), "wrong": ("with the fault", COLOURS["random"])}
    rows = [
        {"place": place + shift, "colour": sides[side][1], **vars(both[side])}
        for place, both in enumerate(found.values())
        for side, shift in (("right", -0.12), ("wrong", 0.12))
    ]
    interval_dotplot(axes, pd.DataFrame(rows), labels=list(found))
    for name, colour in sides.values():
        axes.plot([], [], "o", ms=4, color=colour, label=name)
    zero_line(axes)
    axes.set(xlabel="mean score on test instructions, 95 % interval")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


@styled
def search_steps(groups: Mapping[str, tuple[Mapping[str, Interval], Mapping[str, Sequence[float]]]]) -> Figure:
    """Draw how often the vector of each way to choose succeeds: a panel for each group of models.

    Parameters
    ----------
    groups : mapping
        Title of a panel → the rate of each way with its interval, and the rates on each model, drawn as small dots.
    """
    ways = next(iter(groups.values()))[0]
    figure, axes_of = panels([1] * len(groups), height=0.3 * len(ways) + 0.8)
    colours = dict.fromkeys(ways, COLOURS["DCT"]) | dict.fromkeys(("unsteered", "any", "oracle"), (0.45,) * 3)
    colours["random"] = COLOURS["random"]
    for axes, (title, (success, each)) in zip(axes_of, groups.items(), strict=True):
        rates(axes, success, colours, each=each)
        axes.set(xlabel="test requests that succeed", title=title)
    for axes in axes_of[1:]:
        axes.tick_params(axis="y", labelleft=False)
    return figure


@styled
def pairwise_agreement(found: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Draw each measure of agreement in a panel, one row for each pair of a judge and a reader.

    Parameters
    ----------
    found : mapping
        Pair → measure (``precision``, ``recall``, ``kappa``) → its value and interval.
    """
    measures = list(next(iter(found.values())))
    figure, axes_of = panels([1] * len(measures), height=0.9 + 0.28 * len(found))
    for axes, measure in zip(axes_of, measures, strict=True):
        rows = [
            {"place": place, "colour": COLOURS["DCT"], "text": f"{each[measure].mean:.2f}", **vars(each[measure])}
            for place, each in enumerate(found.values())
        ]
        interval_dotplot(axes, pd.DataFrame(rows), labels=list(found) if axes is axes_of[0] else [""] * len(found))
        axes.set(xlabel=measure, xlim=(-0.03, 1.03))
    return figure


@styled
def replicates(sides: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw a dot for each organism and a bar at their mean. There is no interval, because organisms are few.

    Parameters
    ----------
    sides : mapping
        Title of a panel → name of a number → its values on the organisms. Numbers are drawn from the top.
    """
    figure, axes_of = panels([1] * len(sides), height=2.6)
    for axes, (title, numbers) in zip(axes_of, sides.items(), strict=True):
        rows = [
            {"place": place, "mean": sum(each) / len(each), "each": each, "colour": COLOURS["DCT"]}
            for place, each in enumerate(numbers.values())
        ]
        interval_dotplot(axes, pd.DataFrame(rows), labels=list(numbers), below=0)
        zero_line(axes)
        axes.set(xlabel="mean test score", title=title)
    return figure


_SYMBOLS = {"nonlinearity": "λ", "horizon": "t − s"}


@styled
def choices(found: pd.DataFrame, *, usual: str = "reference", floor: str = "random") -> Figure:
    """Draw the best vector's test score under each variant of a fit: a dot for each seed, and a bar at their mean.

    Variants are rows, and a band of grey or white holds the variants of one choice.

    Parameters
    ----------
    found : DataFrame
        Columns ``choice`` (what was changed), ``value`` (its new value, as text), ``seed`` and ``score`` (NaN where the
        calibration finds no scale). The variants of a choice stand one after another.
    usual : str
        The choice with which the others are compared: a dotted line marks its mean.
    floor : str
        The choice that stands for random vectors, which have their own colour.
    """
    variants: Any = list(found.groupby(["choice", "value"], sort=False)["score"])
    figure, (axes,) = panels((1,), height=0.8 + 0.24 * len(variants), width=0.8 * WIDTH)
    colours = {usual: "0.2", floor: COLOURS["random"]}
    order = list(found["choice"].unique())
    rows, labels = [], []
    for place, ((choice, value), scores) in enumerate(variants):
        colour = colours.get(choice, COLOURS["DCT"])
        rows.append({"place": place, "mean": scores.mean(), "each": list(scores), "colour": colour})
        labels.append(choice if choice in colours else f"{_SYMBOLS.get(choice, choice)}: {value}")
        if missing := int(scores.isna().sum()):
            text = "no scale" if missing == len(scores) else f"no scale for {missing} of {len(scores)}"
            axes.annotate(text, (0.02, place), xycoords=("axes fraction", "data"), va="center", color="0.4")
        if choice == usual:
            axes.axvline(scores.mean(), color="0.6", lw=0.8, ls=":", zorder=0)
        if order.index(choice) % 2 == 0:
            axes.axhspan(place - 0.5, place + 0.5, color="0.95", zorder=-1, lw=0)
    interval_dotplot(axes, pd.DataFrame(rows), labels=labels, below=0)
    axes.set(xlabel="test score of the best vector", ylim=(len(labels) - 0.5, -0.5))
    return figure


_ENDS = {"source": "source layer, V", "target": "target layer, U"}
_DETECTORS = {"factors": COLOURS["DCT"], "random": COLOURS["random"], "residual": "0.3"}


@styled
def anomaly(aurocs: pd.DataFrame, means: pd.DataFrame) -> Figure:
    """Draw the AUROC of each detector over organisms: the mean, its interval, and a dot for each organism.

    There is one panel for each contrast of two kinds of prompts.

    Parameters
    ----------
    aurocs : DataFrame
        Columns ``organism``, ``planted`` (whether it has a secret; dots of clean organisms are hollow), ``end``
        (``source`` or ``target``), ``detector``, ``contrast`` and ``mean``.
    means : DataFrame
        Means over organisms with a secret: columns ``end``, ``detector``, ``contrast``, ``mean``, ``low`` and ``high``.
        The last two are NaN where there is no interval.
    """
    contrasts = list(means["contrast"].unique())
    detectors = means[["end", "detector"]].drop_duplicates()
    labels: list[str] = []  # from the top: a heading for each end, then its detectors
    places: dict[tuple[str, str], int] = {}
    for end, each in detectors.groupby("end", sort=False)["detector"]:
        labels.append(_ENDS[str(end)])
        places |= {(str(end), detector): len(labels) + row for row, detector in enumerate(each)}
        labels += list(each)
    figure, axes_of = panels([1] * len(contrasts), height=0.9 + 0.21 * len(labels))
    keys = ["contrast", "end", "detector"]
    dots: Any = aurocs.groupby([*keys, "planted"])["mean"].apply(list)
    for axes, contrast in zip(axes_of, contrasts, strict=True):
        rows = []
        of_contrast: Any = means[means["contrast"] == contrast]
        for mean in of_contrast.to_dict("records"):
            end, detector = mean["end"], mean["detector"]
            place, colour = places[end, detector] - 0.1, _colour(detector)
            clean = dots.get((contrast, end, detector, False), [])
            axes.scatter(clean, [place + 0.36] * len(clean), s=9, linewidths=0.8, facecolors="none", edgecolors=colour)
            each = dots.get((contrast, end, detector, True), [])
            rows.append({**mean, "place": place, "each": each, "colour": colour, "text": f"{mean['mean']:.2f}"})
        interval_dotplot(axes, pd.DataFrame(rows), labels=labels, below=0.36)
        axes.axvline(0.5, color="0.6", lw=0.8, ls=":", zorder=0)
        axes.annotate("chance ", (0.5, 0), ha="right", va="center", fontsize=8, color="0.4")
        axes.set(title=contrast, xlabel="AUROC", xlim=(0, 1.02))
        for tick in axes.get_yticklabels():
            heading = tick.get_text() in _ENDS.values()
            tick.set(color="0.15" if heading else _colour(tick.get_text()), weight="bold" if heading else "normal")
    for axes in axes_of[1:]:
        axes.tick_params(axis="y", labelleft=False)
    key = "filled dots: organisms with a secret; hollow: clean organisms; above: mean of filled dots, 95 % interval"
    figure.supxlabel(key, fontsize=8, color="0.4")
    return figure


def _colour(detector: str) -> Any:
    return _DETECTORS[detector.partition(",")[0]]


_LIKENESS = {
    "cosine": ("factors", COLOURS["DCT"], "o"),
    "overlap": ("span", "0.55", "s"),
    "behaviour": ("behaviour", "0.1", "^"),
}
_DIRECTIONS = {"random": (COLOURS["random"], "o"), "factors": (COLOURS["DCT"], "s"), "mixed": (COLOURS["clean"], "D")}


@styled
def stability(variants: pd.DataFrame, errors: pd.DataFrame) -> Figure:
    """Draw how similar two fits are, the scores of their best vectors, and the errors of transcoders.

    Parameters
    ----------
    variants : DataFrame
        One row for each pair of fits, with means over models: ``cosine`` of matched factors, ``overlap`` of the spans
        and ``behaviour`` (None where no token changes). ``each`` maps each of these names to a list of one value a
        model. ``scores`` is a list of pairs, one a model: the test scores of the best vector of each fit.
    errors : DataFrame
        Median relative errors: one row for each transcoder, one column for each kind of direction.
    """
    figure, (left, middle, right, last) = panels((3, 2, 2, 2), height=3.3)
    places = np.arange(len(variants))[::-1]
    legend: Any = {"frameon": False, "fontsize": 8, "loc": "lower center", "handletextpad": 0}
    for shift, (column, (name, colour, marker)) in zip((0.2, 0, -0.2), _LIKENESS.items(), strict=True):
        means = variants[column].astype(float)
        left.scatter(means, places + shift, color=colour, marker=marker, s=16, label=name)
        for place, each in zip(places, variants["each"], strict=True):
            known = [value for value in each[column] if value is not None] or [np.nan]
            left.plot([min(known), max(known)], [place + shift] * 2, color=colour, lw=0.8)
    left.set_yticks(places, list(variants.index))
    left.set(xlim=(0, 1.02), xlabel="similarity of the two fits")
    left.legend(bbox_to_anchor=(0.4, 1.0), ncols=3, **legend)
    for place, pairs in zip(places, variants["scores"], strict=True):
        for shift, pair in zip(_shifts(len(pairs)), pairs, strict=True):
            middle.plot(pair, [place + shift] * 2, color="0.3", marker="o", ms=3, lw=0.8)
    zero_line(middle)
    middle.set_yticks(places, [])
    middle.set(xlabel="best test scores")
    second = errors.filter(like="Hessian, ")
    curved = second.rename(columns=lambda column: column.removeprefix("Hessian, "))
    rows = np.arange(len(errors))[::-1]
    for axes, table, label in (
        (right, errors.drop(columns=second.columns), "error of Δ"),
        (last, curved, "error of Hessian"),
    ):
        for shift, (kind, values) in zip(_shifts(table.shape[1]), table.items(), strict=True):
            colour, marker = _DIRECTIONS[str(kind)]
            axes.scatter(values, rows + shift, color=colour, marker=marker, s=16, label=str(kind))
        axes.axvline(1, color="0.6", lw=0.8, ls=":")
        axes.set_yticks(rows, [*map(str, errors.index)] if axes is right else [""] * len(errors))
        axes.set(xlabel=label, xscale="log", xlim=(0.8 * errors.min(axis=None), 1.25 * errors.max(axis=None)))
        plain_log(axes.xaxis)
        axes.legend(bbox_to_anchor=(0.5, 1.0), ncols=1, **legend)
    return figure


def _shifts(count: int) -> np.ndarray:
    """Return vertical shifts from a row, at which `count` marks stand above one another."""
    return np.linspace(0.2, -0.2, count) if count > 1 else np.zeros(count)
