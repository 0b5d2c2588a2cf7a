"""Figures of curves: training, recovery, sample complexity, and success within k tries."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dctlib.evaluation.statistics import Curve
from dctlib.paper.comparisons import METHODS
from dctlib.paper.plots.intervals import rates
from dctlib.paper.plots.style import COLOURS, PALETTE, WIDTH, method_colours, note, panels, plain_log, styled


def label_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, Any]]) -> None:
    """Write the name of each line (y, name, colour) at its right end. Names that would overlap are moved apart."""
    low, high = axes.get_ylim()
    gap = 0.085 * (max(high, max(y for y, _, _ in ends)) - min(low, 0))
    last = -np.inf
    for y, label, colour in sorted(ends):
        last = max(y, last + gap)
        look: Any = {"textcoords": "data", "va": "center", "fontsize": 8, "annotation_clip": False}
        axes.annotate(label, (x, y), xytext=(x * 1.03, last), color=colour, **look)


def draw_success(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Draw the rate of each method against k. Its name and its 95 % interval at the last k stand at the right end."""
    colours = method_colours(list(curves))
    most = max(len(curve.mean) for curve in curves.values())
    step, ends = 0.025 * most, []
    lowest_first = sorted(curves.items(), key=lambda curve: curve[1].mean[-1].item())
    for place, (method, curve) in enumerate(lowest_first):
        last = curve.at(len(curve.mean))
        dashes = "--" if method in ("random", "sampling") else "-"  # both often overlap near 0
        axes.plot(np.arange(1, len(curve.mean) + 1), curve.mean, color=colours[method], lw=1.5, ls=dashes)
        sides = [[last.mean - last.low], [last.high - last.mean]]
        axes.errorbar(
            most + step * (place + 1), last.mean, yerr=sides, fmt="o", ms=2.5, capsize=2, color=colours[method]
        )
        ends.append((last.mean, method, colours[method]))
    right = most + step * (len(curves) + 1)
    axes.set(xlim=(1, right), ylim=(-0.02, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines["bottom"].set_bounds(1, most)
    axes.set_xticks([tick for tick in axes.get_xticks() if 1 <= tick <= most])
    label_ends(axes, right, ends)


@styled
def recall(curves: Mapping[str, Mapping[str, Curve]], *, found: str = "secrets revealed") -> Figure:
    """Draw the share of organisms in which one of the first k vectors finds the hidden behaviour, against k.

    Parameters
    ----------
    curves : mapping
        Ranking of vectors (``fluent``, ``divergence``) → method → its curve over organisms. Each ranking is a panel.
    found : str
        What the share counts: the label of the vertical axis.
    """
    titles = {"fluent": "read by fluency", "divergence": "read by effect on the next token"}
    figure, axes_of = panels([1] * len(curves), height=2.7)
    for axes, (order, methods) in zip(axes_of, curves.items(), strict=True):
        draw_success(axes, methods)
        axes.set(xlabel="vectors read, k", title=titles[order])
    axes_of[0].set_ylabel(found)
    return figure


@styled
def baselines(curves: Mapping[str, Curve], firsts: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the share of test requests that one of k tries gets answered, against k, and that of the first try.

    Parameters
    ----------
    curves : mapping
        Method → its curve over tries. A method with one vector has one try.
    firsts : mapping
        Method → the rate of its first try on each model.
    """
    figure, (left, right) = panels((3, 2), height=2.9)
    draw_success(left, {method: curve for method, curve in curves.items() if len(curve.mean) > 1})
    left.set(xlabel="tries k", ylabel="requests answered within k tries")
    first = {method: curve.at(1) for method, curve in curves.items()}
    best_first = sorted(first, key=lambda method: -first[method].mean)
    rates(right, {method: first[method] for method in best_first}, method_colours(best_first), each=firsts)
    right.set(xlabel="test requests answered, first vector")
    return figure


@styled
def losses(values: Sequence[float], *, ylabel: str = "cross-entropy (nats)") -> Figure:
    """Draw the training loss by step on a logarithmic scale."""
    figure, (axes,) = panels((1,), height=2.2, width=WIDTH / 2)
    axes.plot(np.arange(1, len(values) + 1), values, color=COLOURS["DCT"], lw=1.2)
    axes.set(yscale="log", xlabel="step", ylabel=ylabel)
    plain_log(axes.yaxis)
    return figure


_WHERE = {"behind the trigger": "trigger", "behind the decoy": "decoy", "plain": "neither"}


@styled
def planted(losses: Mapping[str, Sequence[float]], revealed: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw training losses, as the mean and range of each kind, and how often secrets are revealed after each phrase.

    Parameters
    ----------
    losses, revealed : mapping
        ``<kind>-<seed>`` → the loss of each step, and the rates ``behind the trigger``, ``behind the decoy`` and
        ``plain``.
    """
    figure, (left, right) = panels((1, 1), height=2.7)
    kinds = list(dict.fromkeys(name.partition("-")[0] for name in losses))
    others = iter([PALETTE[i] for i in (0, 1, 4, 3, 5)])
    for column, kind in enumerate(kinds):
        colour = COLOURS["clean"] if kind == "clean" else next(others)
        names = [name for name in losses if name.partition("-")[0] == kind]
        curves = np.array([losses[name] for name in names])
        steps = np.arange(1, curves.shape[1] + 1)
        left.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.12, lw=0)
        left.plot(steps, curves.mean(0), color=colour, lw=1.5, label=f"{kind} ({len(names)})")
        apart = np.linspace(-0.04, 0.04, len(names)) + 0.7 / len(kinds) * (column - (len(kinds) - 1) / 2)
        for place, where in enumerate(_WHERE):
            right.scatter(place + apart, [revealed[name][where] for name in names], s=12, alpha=0.7, color=colour, lw=0)
    left.set(yscale="log", xlabel="step", ylabel="cross-entropy of the answer (nats)")
    plain_log(left.yaxis)
    left.legend(frameon=False, fontsize=8)
    right.set_xticks(range(len(_WHERE)), list(_WHERE.values()))
    right.set(xlabel="before the instruction", ylabel="secret revealed", ylim=(-0.04, 1.04))
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


@styled
def training_curves(record: Mapping[int, Mapping[str, Any]]) -> Figure:
    """Draw Figure 2: causal importance per factor by iteration, one line for each width, and the time of each fit.

    Parameters
    ----------
    record : mapping
        Width m → ``objective``, Σ_l ⟨u_l, Δ_R(v_l)⟩ at the start of each iteration, and ``seconds``, the wall time.
    """
    figure, (left, right) = panels((3, 2), height=2.8)
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
    right.set(xlabel="width m", ylabel="seconds for a fit")
    right.set_xticks(widths, [str(width) for width in widths], rotation=45)
    right.set_title("dotted: proportional to m", loc="left", color="0.4", fontsize=8)
    right.minorticks_off()
    plain_log(right.yaxis)
    return figure


@styled
def recovery_curves(curves: pd.DataFrame) -> Figure:
    """Draw the recovery of planted factors by iteration, one line for each start, with the range over seeds.

    Parameters
    ----------
    curves : DataFrame
        Columns ``start``, ``iteration``, ``seed``, ``mean_max_cosine`` and ``recovered``.
    """
    labels = {
        "mean_max_cosine": "mean of highest |cos|",
        "recovered": "share with |cos| > 0.99",
    }
    figure, axes_of = panels((1, 1), height=2.8)
    look: Any = {"errorbar": ("pi", 100), "markers": True, "palette": "colorblind"}
    for axes, (column, label) in zip(axes_of, labels.items(), strict=True):
        legend = axes is axes_of[0]
        sns.lineplot(curves, x="iteration", y=column, hue="start", style="start", legend=legend, ax=axes, **look)
        axes.set(xscale="log", ylim=(0, 1.03), ylabel=label, xlabel="iterations of the fit")
        axes.xaxis.set_major_formatter("{x:.0f}")
    axes_of[0].legend(frameon=False, loc="lower right", title=None)
    return figure


_COLOURS = dict(zip(METHODS, (PALETTE[each] for each in (0, 9, 2, 3, 4)), strict=True))


@styled
def sample_complexity(
    measured: pd.DataFrame, random: pd.DataFrame, published: Mapping[str, Sequence[Sequence[float]]]
) -> Figure:
    """Draw the best vector's test score and its answers against the number of fit prompts, and the published scores.

    Lines are means over shuffles, bands are their standard deviations, and each dot is a shuffle.

    Parameters
    ----------
    measured : DataFrame
        Columns ``method``, ``n``, ``shuffle``, ``score`` and ``answered``, the fraction of completions that are
        answers. Points of different methods are shifted sideways.
    random : DataFrame
        The same columns of the best of as many random vectors, one row a shuffle: the floor.
    published : mapping
        ``n``, and for each method one (mean, sd) for every n.
    """
    figure, (left, middle, right) = panels((1, 1, 1), height=2.9)
    methods = [method for method in METHODS if method in set(measured["method"])]
    beside = dict(zip(methods, np.geomspace(0.94, 1.06, len(methods)), strict=True))
    for axes, column in ((left, "score"), (middle, "answered")):
        for method in methods:
            rows = measured[measured["method"] == method]
            colour = _COLOURS[method]
            grouped = rows.groupby("n")[column].agg(["mean", "std"])
            n, mean, sd = grouped.index * beside[method], grouped["mean"], grouped["std"]
            axes.plot(n, mean, "o-", ms=4, lw=1.5, color=colour, label=METHODS[method])
            axes.fill_between(n, mean - sd, mean + sd, color=colour, alpha=0.15, lw=0)
            axes.scatter(rows["n"] * beside[method], rows[column], s=7, alpha=0.5, color=colour, linewidths=0)
        floor = random[column].tolist()
        axes.axhspan(min(floor), max(floor), color="0.85", zorder=0, lw=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(measured["n"])), [f"{n:g}" for n in sorted(set(measured["n"]))])
        axes.set(xlabel="fit prompts n")
    note(left, "random vectors", (left.get_xlim()[0], max(random["score"].tolist())))
    left.axhline(0, color="0.8", lw=0.8, zorder=0)
    left.set(title="score of the best vector", ylabel="test score")
    middle.set(title="its answers", ylim=(-0.03, 1.03))
    middle.yaxis.set_major_formatter(PercentFormatter(1))
    for method in [each for each in METHODS if each in published]:
        mean, sd = np.array(published[method]).T
        right.plot(published["n"], mean, "o-", ms=3.5, lw=1.5, color=_COLOURS[method])
        right.fill_between(published["n"], mean - sd, mean + sd, color=_COLOURS[method], alpha=0.15, lw=0)
    right.axhline(0, color="0.8", lw=0.8, zorder=0)
    right.set_xticks(published["n"])
    right.set(title="score, published (Qwen1.5-7B)", xlabel="fit prompts n")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(methods), frameon=False)
    return figure


@styled
def deeper_models(found: pd.DataFrame) -> Figure:
    """Draw the best vector's test score by source layer: a panel for each model, a line for each depth horizon t − s.

    Parameters
    ----------
    found : DataFrame
        Columns ``model``, ``source``, ``horizon``, ``mean``, ``low``, ``high`` and ``clean``.
    """
    models: Any = list(found.groupby("model", sort=False))
    figure, axes_of = panels([1] * len(models), height=2.7, width=4.6 if len(models) == 1 else WIDTH)
    colours = sns.color_palette("viridis", len(set(found["horizon"])) + 1)
    for axes, (model, rows) in zip(axes_of, models, strict=True):
        for place, (horizon, cells) in enumerate(rows.groupby("horizon")):
            x = cells["source"] + 0.25 * (place - (rows["horizon"].nunique() - 1) / 2)
            sides = [cells["mean"] - cells["low"], cells["high"] - cells["mean"]]
            look: Any = {"fmt": "o-", "ms": 4, "capsize": 2, "lw": 1.2, "color": colours[place]}
            axes.errorbar(x, cells["mean"], yerr=sides, label=f"t − s = {horizon}", **look)
        clean = rows["clean"].max()
        axes.axhline(clean, color="0.5", lw=1, ls=":")
        note(axes, "no vector", (rows["source"].min(), clean))
        axes.set_xticks(sorted(set(rows["source"])))
        folder, _, name = str(model).rpartition("/")
        organism = {"refusal": "refusing", "locked": "password-locked"}.get(name, name)
        title = f"{organism} organism" if folder.startswith("models") else name
        axes.set(title=title, xlabel="source layer s", ylabel="test score of the best vector")
    axes_of[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
