import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.text import Annotation
from tiny import unit_rows

from dctlib.evaluation.statistics import Interval, success_at_k
from dctlib.paper.plots.curves import (
    baselines,
    deeper_models,
    losses,
    planted,
    recall,
    recovery_curves,
    sample_complexity,
    training_curves,
)
from dctlib.paper.plots.damage import success_and_damage
from dctlib.paper.plots.intervals import faults, pairwise_agreement, replicates, search_steps, stability
from dctlib.paper.plots.style import COLOURS, method_colours, save_figure
from dctlib.paper.plots.vectors import (
    ablation,
    candidates,
    circuit_breaker,
    multiplicity,
    password_locked,
    real_models,
    real_multiplicity,
    scores,
)

RECOVERY = pd.DataFrame(
    {"start": "random", "iteration": n, "seed": seed, "mean_max_cosine": n / 10, "recovered": seed / 2}
    for n in (1, 10)
    for seed in (0, 1)
)
ABLATED = {"scores": [-8.0, -7.0, 1.0], "average": -4.7, "v_avg": 2.0, "v_svd": 3.0}
METHODS = ("linear", "linear_projected", "quadratic", "exponential")
COMPLEXITY = pd.DataFrame(
    {"method": method, "n": n, "shuffle": shuffle, "score": place + n + shuffle / 2, "answered": shuffle / 2}
    for place, method in enumerate(METHODS)
    for n in (1, 2)
    for shuffle in (0, 1)
)
FLOOR = pd.DataFrame({"score": [-8.0, -7.0], "answered": [0.0, 0.25]})
PUBLISHED = {"n": [2, 4], **{method: [[1.0, 0.5], [2.0, 0.25]] for method in METHODS}}
DEPTH = pd.DataFrame(
    {"model": model, "source": s, "horizon": h, "mean": 1.0 * s, "low": s - 1.0, "high": s + 1.0, "clean": -9.0}
    for model in ("a/small", "a/large")
    for s in (5, 10)
    for h in (5, 10)
)
SCAN = pd.DataFrame(
    {"method": method, "source": s, "multiplier": k, "success": success, "score": s - 7.0}
    for method, successes in {"DCT": (0.5, 0.25), "random": (0.0,), "difference of means": (1.0,)}.items()
    for s in (5, 10)
    for k in (1.0, 2.0)
    for success in successes
)
CURVE = success_at_k(torch.tensor([[True, False, False], [False, True, False]]))
CANDIDATES = pd.DataFrame(
    {
        "source": ["exponential", "random", "power steering", "exponential"],
        "first": [0.4, 0.1, 0.3, float("nan")],
        "held_out": [0.5, 0.1, float("nan"), 0.2],
        "damage": [0.3, 0.1, float("nan"), 0.4],
        "found": [True, False, False, False],
    }
)
TRIED = pd.DataFrame(
    {"method": method, "answered": 0.5 * rate, "damage": 0.1 + rate, "chosen": rate == 1}
    for method in ("DCT", "random")
    for rate in (0, 1)
)
TESTED = pd.DataFrame({"method": ["DCT", "random"], "mean": [0.9, 0.2], "low": [0.8, 0.1], "high": [1.0, 0.3]})
FIGURES = {
    "success_and_damage": lambda: success_and_damage(TRIED, TESTED, 0.5),
    "training_curves": lambda: training_curves(
        {8: {"objective": [1.0, 2.0, 3.0], "seconds": 1.0}, 16: {"objective": [2.0, 4.0, 7.0], "seconds": 2.1}}
    ),
    "scores": lambda: scores(
        {"DCT": [3.0, 1.0, -2.0], "random": [-5.0, -6.0, -7.0]},
        {"clean": [-8.0, -7.0], "random": [-6.0, -5.5], "DCT": [5.0, 6.0]},
    ),
    "one_width": lambda: training_curves({8: {"objective": [1.0, 2.0], "seconds": 1.0}}),
    "recovery_curves": lambda: recovery_curves(RECOVERY),
    "faults": lambda: faults({"no mask": {"right": Interval(3.0, 2.0, 4.0), "wrong": Interval(-1.0, -2.0, 0.0)}}),
    "multiplicity": lambda: multiplicity(
        unit_rows(6, 9), [1.0, 2.0, 3.0, 4.0, 5.0, 9.0], {"v_avg": 6.0, "v_svd": -1.0}
    ),
    "ablation": lambda: ablation({"clean": -9.0, "source": ABLATED, "target": ABLATED}),
    "losses": lambda: losses([4.0, 1.0, 0.2]),
    "nothing_trained": lambda: losses([]),
    "sample_complexity": lambda: sample_complexity(COMPLEXITY, FLOOR, PUBLISHED),
    "deeper_models": lambda: deeper_models(DEPTH),
    "circuit_breaker": lambda: circuit_breaker(SCAN, {"none": Interval(0.0, 0.0, 0.0), "DCT": Interval(0.5, 0.0, 1.0)}),
    "baselines": lambda: baselines(
        {"DCT": CURVE, "random": CURVE, "LoRA": success_at_k(torch.tensor([[True, False]]))},
        {"DCT": [0.0, 0.5], "random": [0.3], "LoRA": [0.5, 0.5]},
    ),
    "auditing": lambda: recall({by: {"DCT": CURVE, "random": CURVE} for by in ("fluent", "divergence")}),
    "secrets": lambda: planted(
        {"backdoor-0": [2.0, 0.5], "backdoor-1": [3.0, 0.3], "clean-0": [0.5, 0.4]},
        {
            "backdoor-0": {"behind the trigger": 1.0, "behind the decoy": 0.0, "plain": 0.1},
            "backdoor-1": {"behind the trigger": 0.9, "behind the decoy": 0.2, "plain": 0.0},
            "clean-0": {"behind the trigger": 0.0, "behind the decoy": 0.0, "plain": 0.0},
        },
    ),
    "search_steps": lambda: search_steps(
        dict.fromkeys(
            ("refusing", "adding"),
            (
                {"strongest factor": Interval(0.2, 0.0, 0.4), "random": Interval(0.0, 0.0, 0.0)},
                {"strongest factor": [0.1, 0.3], "random": [0.0, 0.0]},
            ),
        )
    ),
    "pairwise_agreement": lambda: pairwise_agreement(
        {
            pair: {measure: Interval(0.8, 0.7, 0.9) for measure in ("precision", "recall", "kappa")}
            for pair in ("judge, reader 1", "reader 1, reader 2")
        }
    ),
    "replicates": lambda: replicates({"added": {"best": [3.0, 5.0], "mean": [1.0, 2.0]}, "ablated": {"v": [0.0, 1.0]}}),
    "stability": lambda: stability(
        pd.DataFrame(
            {
                "cosine": [1.0, 0.4],
                "overlap": [1.0, 0.6],
                "behaviour": [0.9, None],
                "each": [dict.fromkeys(("cosine", "overlap", "behaviour"), of) for of in ([0.9, 1.0], [0.3])],
                "scores": [[[3.0, 2.0], [1.0, 2.5]], [[-1.0, 0.0]]],
            },
            index=["both, usual", "random"],
        ),
        pd.DataFrame(
            {"random": [0.9, 0.8], "factors": [0.5, 0.4], "Hessian, random": [1.0, 0.7]}, index=["m = 8", "merged"]
        ),
    ),
    "real_multiplicity": lambda: real_multiplicity(
        {"DCT": [1.0, 0.5, 0.0], "random": [0.2, 0.0, 0.0]},
        {
            label: Interval(0.5, 0.25, 0.75)
            for label in ("unsteered", "best DCT vector", "random, ablated", "source, ablated")
        },
    ),
    "real_models": lambda: real_models(
        {"0.5B": {kind: Interval(0.5, 0.25, 0.75) for kind in ("unsteered", "random", "DCT")}},
        {"0.5B": {"random": [-3.0, -4.0], "DCT": [2.0, -1.0]}},
        {"0.5B": -5.0},
    ),
    "discover": lambda: candidates(CANDIDATES, random=0.1),
    "password_locked": lambda: password_locked(
        {"DCT": [0.0, 0.5], "random": [0.0, 0.0]},
        {"locked": Interval(0.0, 0.0, 0.0), "steered": Interval(0.5, 0.0, 1.0)},
    ),
}


def dots_of(axes):
    """Return the x of each group of dots."""
    groups = [points for points in axes.collections if isinstance(points, PathCollection)]
    return [np.asarray(points.get_offsets())[:, 0].tolist() for points in groups]


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_saved_twice_over_and_the_same_each_time(name, tmp_path):
    for run in ("one", "two"):
        save_figure(FIGURES[name](), tmp_path / run / name)
    for suffix in (".png", ".svg"):
        one, two = ((tmp_path / run / name).with_suffix(suffix).read_bytes() for run in ("one", "two"))
        assert one == two
        assert len(one) > 2000


def test_every_width_is_labelled_and_every_vector_drawn():
    left, _ = FIGURES["training_curves"]().axes
    assert [text.get_text() for text in left.texts] == ["m = 8", "m = 16"]
    assert list(np.asarray(left.lines[1].get_ydata())) == [2 / 16, 4 / 16, 7 / 16]
    left, right = FIGURES["scores"]().axes
    assert [text.get_text() for text in left.texts] == ["DCT", "random"]
    assert list(np.asarray(left.lines[0].get_ydata())) == [3.0, 1.0, -2.0]
    assert [label.get_text() for label in right.get_yticklabels()] == ["clean", "best random", "best DCT"]


def test_losses_are_drawn_by_step_with_plain_numbers_beside_them():
    figure = FIGURES["losses"]()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert np.asarray(axes.lines[0].get_xydata()).tolist() == [[1, 4.0], [2, 1.0], [3, 0.2]]
    assert {"0.5", "1", "2"} <= {label.get_text() for label in axes.get_yticklabels()}


def test_what_was_ablated_has_a_line_and_a_name_with_its_score():
    for axes, letter in zip(FIGURES["ablation"]().axes, "vu", strict=True):
        named = {text.get_text().strip(): text.xy for text in axes.texts if isinstance(text, Annotation)}
        avg, svd = (f"${letter}_\\mathrm{{{kind}}}$" for kind in ("avg", "svd"))
        assert {name: x for name, (x, _) in named.items()} == {
            "clean −9.0": -9.0,
            "average −4.7": -4.7,
            f"{avg} +2.0": 2.0,
            f"{svd} +3.0": 3.0,
        }
        heights = [named[name][1] for name in sorted(named, key=lambda name: named[name][0])]
        assert heights == sorted(heights, reverse=True)  # or a name would be crossed by a line
        assert sorted(np.asarray(line.get_xdata())[0] for line in axes.lines) == [-9.0, -4.7, 2.0, 3.0]


def test_cells_hold_the_best_of_each_method_and_the_test_its_intervals():
    panels = {axes.get_title(): axes for axes in FIGURES["circuit_breaker"]().axes}
    cells = {title: [text.get_text() for text in axes.texts] for title, axes in panels.items()}
    assert cells["attack success, DCT"] == ["50%"] * 4
    assert cells["attack success, random"] == ["0%"] * 4
    assert cells["score, DCT"] == cells["score, random"] == ["−2", "+3"] * 2
    assert [label.get_text() for label in panels["score, DCT"].get_yticklabels()] == ["1 R", "2 R"]
    assert cells["attack success, test"] == ["0%", "50%"]
    assert len({panels[f"score, {method}"].collections[0].get_clim() for method in ("DCT", "random")}) == 1


def test_every_kind_has_a_curve_and_every_organism_a_dot():
    left, right = FIGURES["secrets"]().axes
    assert left.get_legend_handles_labels()[1] == ["backdoor (2)", "clean (1)"]
    assert np.asarray(left.lines[0].get_ydata()).tolist() == [2.5, 0.4]
    heights = sorted(y for dots in right.collections for _, y in np.asarray(dots.get_offsets()))
    assert heights == [0, 0, 0, 0, 0, 0.1, 0.2, 0.9, 1]


def test_curves_are_named_in_the_colour_of_their_method_and_end_in_an_interval():
    left, right = FIGURES["baselines"]().axes
    assert {text.get_text(): text.get_color() for text in left.texts} == method_colours(["DCT", "random"])
    assert [label.get_text() for label in right.get_yticklabels()] == ["LoRA", "DCT", "random"]
    assert [text.get_text() for text in right.texts] == ["50%", "33%", "33%"]
    assert len(left.containers) == 2
    assert [0.0, 0.5] in dots_of(right)  # a dot for each organism
    shades = method_colours(["DCT, n = 1", "DCT, n = 4", "random", "anything else"])
    assert len(set(shades.values())) == 4
    assert shades["random"] == COLOURS["random"]


def test_drawing_leaves_matplotlibs_settings_alone():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    FIGURES["losses"]()
    assert dict(mpl.rcParams) == before


def test_means_and_spreads_are_those_of_the_shuffles():
    figure = FIGURES["sample_complexity"]()
    left, middle, right = figure.axes
    assert [list(np.asarray(line.get_ydata())) for line in left.lines[:4]] == [
        [4.25, 5.25],
        [3.25, 4.25],
        [2.25, 3.25],
        [1.25, 2.25],
    ]
    assert [list(np.asarray(line.get_ydata())) for line in middle.lines[:4]] == [[0.25, 0.25]] * 4
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["exponential", "quadratic", "projected linear", "exact linear"]
    assert [list(np.asarray(line.get_xdata())) for line in right.lines[:4]] == [[2, 4]] * 4


def test_a_method_with_one_number_of_prompts_is_a_point():
    alone = COMPLEXITY.query("method != 'quadratic' or n == 1")
    left, *_ = sample_complexity(alone, FLOOR, PUBLISHED).axes
    assert list(np.asarray(left.lines[1].get_ydata())) == [3.25]


def test_the_chosen_vectors_of_each_method_stand_out():
    left, right = FIGURES["success_and_damage"]().axes
    offsets = [np.asarray(dots.get_offsets()).tolist() for dots in left.collections]
    assert offsets == [[[0.1, 0.0], [1.1, 0.5]], [[1.1, 0.5]]] * 2
    assert [text.get_text() for text in right.get_yticklabels()] == ["DCT", "random"]


def test_models_have_a_panel_each_and_horizons_a_line():
    figure = FIGURES["deeper_models"]()
    assert [axes.get_title() for axes in figure.axes] == ["small", "large"]
    assert figure.axes[-1].get_legend_handles_labels()[1] == ["t − s = 5", "t − s = 10"]


def test_every_vector_s_accuracy_is_drawn_best_first():
    left, right = FIGURES["password_locked"]().axes
    assert [np.asarray(line.get_ydata()).tolist() for line in left.lines] == [[0.5, 0.0], [0.0, 0.0]]
    assert left.get_legend_handles_labels()[1] == ["DCT, 2 vectors", "random, 2 vectors"]
    assert [text.get_text() for text in right.texts] == ["0%", "50%"]


def test_errors_of_the_hessian_have_a_panel_of_their_own():
    *_, errors, second = FIGURES["stability"]().axes
    assert errors.get_legend_handles_labels()[1] == ["random", "factors"]
    assert second.get_legend_handles_labels()[1] == ["random"]
    assert [label.get_text() for label in errors.get_yticklabels()] == ["m = 8", "merged"]


def test_each_order_of_reading_has_a_panel_and_each_method_a_line():
    left, right = FIGURES["auditing"]().axes
    assert left.get_title() != right.get_title()
    for axes in (left, right):
        heights = [list(np.asarray(line.get_ydata())) for line in axes.lines]
        assert [of for of in heights if len(of) > 1] == [[1 / 3, 2 / 3]] * 2  # the others belong to intervals
        assert [text.get_text() for text in axes.texts] == ["DCT", "random"]
    assert left.get_ylabel() == "secrets revealed"
    assert recall({"fluent": {"DCT": CURVE}}, found="organisms unlocked").axes[0].get_ylabel() == "organisms unlocked"


def test_every_organism_is_a_dot_and_their_mean_a_bar():
    left, right = FIGURES["replicates"]().axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["best", "mean"]
    assert dots_of(left) == [[3.0, 5.0], [1.0, 2.0]]
    assert [list(np.asarray(line.get_xdata())) for line in left.lines if line.get_marker() == "|"] == [[4.0], [1.5]]
    assert right.get_title() == "ablated"
