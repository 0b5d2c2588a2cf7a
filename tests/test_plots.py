import numpy as np
import pandas as pd
import pytest
from conftest import unit_rows

from dctlib.metrics import Interval
from dctlib.plots import ablation, faults, losses, multiplicity, recovery_curves, save_figure, scores, training_curves

RECOVERY = pd.DataFrame(
    {"start": "random", "iteration": n, "seed": seed, "mean_max_cosine": n / 10, "recovered": seed / 2}
    for n in (1, 10)
    for seed in (0, 1)
)
ABLATED = {"scores": [-8.0, -7.0, 1.0], "average": -4.7, "v_avg": 2.0, "v_svd": 3.0}
FIGURES = {
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
    "losses": lambda: losses({"refusal": [4.0, 1.0, 0.2]}),
}


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
    assert [label.get_text() for label in right.get_xticklabels()] == ["clean", "best random", "best DCT"]


def test_drawing_leaves_matplotlibs_settings_alone():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    FIGURES["losses"]()
    assert dict(mpl.rcParams) == before
