"""Figures of vectors: their scores by rank, what each unlocks, and how similar they are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor

from dctlib.evaluation.statistics import Interval, interval
from dctlib.paper.plots.intervals import interval_dotplot, rates, zero_line
from dctlib.paper.plots.style import COLOURS, WIDTH, note, panels, styled


def ranked_lines(axes: Axes, values: Mapping[str, Sequence[float]], **look: Any) -> None:
    """Draw the values of each label as a line, from the highest to the lowest, against their rank."""
    for label, each in values.items():
        ranked = np.sort(np.asarray(each))[::-1]
        axes.plot(np.arange(1, len(ranked) + 1), ranked, color=COLOURS[label], lw=1.4, **look)


@styled
def scores(validation: Mapping[str, Sequence[float]], test: Mapping[str, Sequence[float]]) -> Figure:
    """Draw scores of all vectors on validation instructions, and of the chosen ones on each test instruction.

    Parameters
    ----------
    validation : mapping
        Label ("DCT", "random") → the mean score of each vector.
    test : mapping
        Label ("clean", "random", "DCT") → the score on each instruction. Means are drawn with 95 % intervals.
    """
    figure, (left, right) = panels((1, 1), height=2.6)
    ranked_lines(left, validation)
    for label, line in zip(validation, left.lines, strict=True):
        ends: Any = line.get_xydata()
        left.annotate(label, tuple(ends[-1]), xytext=(4, 0), textcoords="offset points", color=COLOURS[label])
    left.axhline(0, color="0.8", lw=0.8, zorder=0)
    left.set(xlabel="rank of the vector", ylabel="mean validation score")
    rows = [
        {"place": place, "each": values, "colour": COLOURS[label], **vars(interval(values))}
        for place, (label, values) in enumerate(test.items())
    ]
    names = [label if label == "clean" else f"best {label}" for label in test]
    interval_dotplot(right, pd.DataFrame(rows), labels=names)
    zero_line(right)
    right.set(xlabel="score on each test instruction")
    return figure


@styled
def password_locked(validation: Mapping[str, Sequence[float]], test: Mapping[str, Interval]) -> Figure:
    """Draw the accuracy of every vector on validation questions, and of the chosen ones on test questions.

    Parameters
    ----------
    validation : mapping
        ``DCT`` and ``random`` → the accuracy of each vector.
    test : mapping
        Condition → the share of test questions that are solved.
    """
    figure, (left, right) = panels((1.2, 1), height=2.6)
    ranked_lines(left, validation, marker="o", ms=2.5)
    for label, line in zip(validation, left.lines, strict=True):
        line.set_label(f"{label}, {len(validation[label])} vectors")
    left.legend(frameon=False)
    left.set(xlabel="rank of the vector", ylabel="accuracy on validation questions", ylim=(-0.03, 1.05))
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    colours = {"steered": COLOURS["DCT"], "random": COLOURS["random"]}
    rates(right, test, {label: colours.get(label, (0.3,) * 3) for label in test})
    right.set(xlabel="accuracy on test questions")
    return figure


_LOOKS = {
    "score": ("score", lambda score: f"{round(score):+d}".replace("-", "−"), {"cmap": "vlag"}),
    "success": ("attack success", "{:.0%}".format, {"cmap": "rocket_r"}),
}


@styled
def circuit_breaker(scan: pd.DataFrame, test: Mapping[str, Interval]) -> Figure:
    """Draw attack success by source layer and multiplier on validation, and of each method's best on test.

    Parameters
    ----------
    scan : DataFrame
        Columns ``method``, ``source``, ``multiplier``, ``success`` (a fraction) and ``score``. Drawn are DCT and random
        vectors, with the highest value at each source layer and multiplier.
    test : mapping
        Method, or ``none`` → the share of test requests that were answered.
    """
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    mosaic: Any = [[*(f"{method} {column}" for column in _LOOKS), "test"] for method in ("DCT", "random")]
    axes = figure.subplot_mosaic(mosaic, width_ratios=(1, 1, 1.1))
    most = scan["score"].abs().max()  # DCT and random vectors share one colour scale
    limits = {"score": {"vmin": -most, "vmax": most}, "success": {"vmin": 0, "vmax": 1}}
    for method, rows in scan[scan["method"].isin(["DCT", "random"])].groupby("method"):
        for column, (title, text, look) in _LOOKS.items():
            panel = axes[f"{method} {column}"]
            table = rows.pivot_table(index="multiplier", columns="source", values=column, aggfunc="max")
            written = {"annot": table.map(text), "fmt": "", "annot_kws": {"fontsize": 8}}
            sns.heatmap(table, cbar=False, ax=panel, **written, **look, **limits[column])
            panel.spines[:].set_linewidth(0)
            panel.set(title=f"{title}, {method}", xlabel="source layer s" * (method == "random"), ylabel="")
            panel.set_yticklabels([f"{multiplier:g} R" for multiplier in table.index], rotation=0)
    figure.supylabel("length of the vector", fontsize="medium")
    colours = {"none": COLOURS["clean"], "DCT": COLOURS["DCT"], "random": COLOURS["random"]}
    rates(axes["test"], test, {label: colours.get(label, (0.25,) * 3) for label in test})
    axes["test"].set(title="attack success, test")
    return figure


@styled
def multiplicity(V: Tensor, each: Sequence[float], aggregates: Mapping[str, float]) -> Figure:
    """Draw |cosine| of every pair of directions, and a histogram of their scores with the scores of aggregates.

    Similar directions stand beside each other.

    Parameters
    ----------
    V : Tensor, (m, d)
        Unit directions.
    each : sequence of float
        The score of each direction.
    aggregates : mapping
        Name of an aggregate → its score.
    """
    figure, (left, right) = panels((1, 1), height=2.9)
    rows = V.double().cpu().numpy()
    order = leaves_list(linkage(rows, "average", metric="cosine"))
    image = left.imshow(abs(rows[order] @ rows[order].T), vmin=0, vmax=1, cmap="rocket_r")
    left.set(xlabel="direction, clustered", ylabel="direction, clustered")
    figure.colorbar(image, ax=left, label="|cos|", shrink=0.8)
    right.hist(each, bins=20, color=COLOURS["DCT"], alpha=0.7)
    marks = {"average": sum(each) / len(each), "best": max(each), **aggregates}
    for place, (name, value) in enumerate(marks.items()):
        right.axvline(value, color="0.3", lw=1, ls=["-", "--", ":", "-."][place % 4], label=f"{name} {value:+.1f}")
    right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    right.set(xlabel="mean test score", ylabel="vectors")
    return figure


_DASHES = {"clean": "--", "average": "-", "v_avg": ":", "v_svd": "-."}


@styled
def ablation(results: Mapping[str, Any]) -> Figure:
    """Draw scores while one direction is ablated: of each source and target direction, and of their aggregates.

    Parameters
    ----------
    results : mapping
        ``clean``, the score of the unchanged model; and for ``source`` and ``target``, the ``scores`` of the single
        directions, their ``average``, and the scores of the aggregates ``v_avg`` and ``v_svd``.
    """
    figure, axes_of = panels((1, 1), height=2.9)
    for axes, side, letter in zip(axes_of, ("source", "target"), "vu", strict=True):
        axes.hist(results[side]["scores"], bins=20, color=COLOURS["DCT"], alpha=0.7)
        marks = {"clean": results["clean"], **{key: results[side][key] for key in ("average", "v_avg", "v_svd")}}
        highest_first = sorted(marks.items(), key=lambda mark: -mark[1])
        for place, (key, score) in enumerate(highest_first):  # names stand one above another, so they do not overlap
            top = 1.05 + 0.09 * place
            name = f"${letter}_\\mathrm{{{key[2:]}}}$" if key.startswith("v_") else key
            across = axes.get_xaxis_transform()
            axes.plot([score, score], [0, top], transform=across, color="0.3", lw=1, ls=_DASHES[key], clip_on=False)
            label = f" {name} {score:+.1f}".replace("-", "−")
            axes.annotate(label, (score, top), xycoords=across, va="center", fontsize=8, annotation_clip=False)
        axes.set(xlabel=f"mean score, {side} direction ablated", ylabel="directions")
    return figure


@styled
def candidates(table: pd.DataFrame, random: float) -> Figure:
    """Draw the first-round scores of a search's candidates by method, and the held-out scores of finalists by damage.

    Parameters
    ----------
    table : DataFrame
        ``candidates`` of :class:`dctlib.discovery.found.FoundVectors`.
    random : float
        The best held-out score of a random direction.
    """
    figure, (left, right) = panels((1, 1), height=2.8)
    methods = sorted(set(table["source"]))
    colours = dict(zip(methods, sns.color_palette("colorblind", len(methods)), strict=True))
    shared: Any = {"hue": "source", "palette": colours, "legend": False, "linewidth": 0}
    read = table.dropna(subset="first")
    sns.stripplot(read, x="first", y="source", order=methods, size=5, alpha=0.5, jitter=False, ax=left, **shared)
    left.set(xlabel="score in the first round", ylabel="", xlim=(-0.03, 1.03))
    finalists = table.dropna(subset="held_out")
    for found, marker in {True: "o", False: "x"}.items():
        rows = finalists[finalists["found"] == found]
        look: Any = {"color": [colours[source] for source in rows["source"]], "marker": marker, "s": 22}
        right.scatter(rows["damage"], rows["held_out"], **look)
        right.plot([], [], marker, color="0.5", ms=5, label="found" if found else "not found")
    if not np.isnan(random):
        right.axhline(random, color="0.5", lw=1, ls="--")
        note(right, "best random direction", (1, random), "0.5")
    right.set(xlabel="damage (nats per token)", ylabel="held-out score", xlim=(0, None), ylim=(-0.03, 1.03))
    right.legend(frameon=False, fontsize=8)
    return figure


@styled
def real_models(
    refused: Mapping[str, Mapping[str, Interval]],
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    clean_scores: Mapping[str, float],
) -> Figure:
    """Draw the share of test requests that each model refuses, and its validation scores by rank.

    Each model is a row of the left panel, and has its own panel of scores.

    Parameters
    ----------
    refused : mapping
        Model → ``unsteered``, ``random`` and ``DCT`` → the share of test requests that it refuses.
    scores : mapping
        Model → ``random`` and ``DCT`` → the mean validation score of each vector.
    clean_scores : mapping
        Model → the mean validation score without a vector.
    """
    figure, (left, *others) = panels([1.2] + [1] * len(scores), height=2.6)
    colours = {"unsteered": COLOURS["clean"], "random": COLOURS["random"], "DCT": COLOURS["DCT"]}
    rows = []
    for row, shares in enumerate(refused.values()):
        for shift, (kind, share) in zip(np.linspace(-0.22, 0.22, len(shares)), shares.items(), strict=True):
            rows.append({"place": row + shift, "colour": colours[kind], **vars(share)})
    interval_dotplot(left, pd.DataFrame(rows), labels=[model.removesuffix("-instruct") for model in refused])
    for kind, colour in colours.items():
        left.plot([], [], "o", ms=4, color=colour, label=kind)
    left.set(xlabel="test requests refused", xlim=(-0.03, 1.03))
    left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0)
    for axes, (model, kinds) in zip(others, scores.items(), strict=True):
        ranked_lines(axes, kinds)
        axes.axhline(clean_scores[model], color=colours["unsteered"], lw=1, ls=":")
        axes.axhline(0, color="0.8", lw=0.8, zorder=0)
        axes.set_title(model.removesuffix("-instruct"), fontsize=8)
        axes.set_xlabel("rank of the vector")
    others[0].set_ylabel("mean validation score")
    return figure


@styled
def real_multiplicity(answered: Mapping[str, Sequence[float]], test: Mapping[str, Interval]) -> Figure:
    """Draw the share of requests that is answered under each vector, by rank, and under single directions.

    Parameters
    ----------
    answered : mapping
        ``DCT`` and ``random`` → the share of validation requests answered under each vector.
    test : mapping
        Condition → the share of test requests answered. A condition that names neither DCT nor random vectors is grey.
    """
    figure, (left, right) = panels((1, 1.1), height=2.9)
    ranked_lines(left, answered)
    for label, line in zip(answered, left.lines, strict=True):
        line.set_label(label)
    left.axhline(0.5, color="0.8", lw=0.8, zorder=0)
    left.legend(frameon=False, fontsize=8)
    left.set(xlabel="rank of the vector", ylabel="validation requests answered", ylim=(-0.03, 1.03))
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    colours = {}
    for label in test:
        kind = "random" if "random" in label else "DCT"
        named = kind in label or label.startswith(("source", "target"))
        colours[label] = COLOURS[kind] if named else (0.35,) * 3
    rates(right, test, colours)
    right.set(xlabel="test requests answered")
    return figure
