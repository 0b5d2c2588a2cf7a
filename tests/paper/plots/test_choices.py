import numpy as np
import pandas as pd

from dctlib.paper.plots.intervals import choices
from dctlib.paper.plots.style import COLOURS, save_figure

VARIANTS = {
    ("reference", "λ = 0.5"): [5.0, 7.0],
    ("prompts", "concatenated"): [4.0, 5.0],
    ("nonlinearity", "0.25"): [3.0, float("nan")],
    ("nonlinearity", "1.0"): [float("nan"), float("nan")],
    ("random", "as many"): [-4.0, -3.0],
}
FOUND = pd.DataFrame(
    {"choice": choice, "value": value, "seed": seed, "score": score}
    for (choice, value), scores in VARIANTS.items()
    for seed, score in enumerate(scores)
)


def test_the_figure_is_the_same_each_time(tmp_path):
    for run in ("one", "two"):
        save_figure(choices(FOUND), tmp_path / run)
    for suffix in (".png", ".svg"):
        one, two = ((tmp_path / run).with_suffix(suffix).read_bytes() for run in ("one", "two"))
        assert one == two
        assert len(one) > 2000


def test_every_variant_has_a_row_with_a_dot_a_seed_and_their_mean():
    (axes,) = choices(FOUND).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["reference", "prompts: concatenated", "λ: 0.25", "λ: 1.0", "random"]
    dots = [np.ma.filled(np.ma.masked_invalid(points.get_offsets()), -99) for points in axes.collections]
    assert [sorted(rows[rows[:, 0] > -99][:, 0]) for rows in dots] == [[5, 7], [4, 5], [3], [], [-4, -3]]
    means = [np.asarray(line.get_xdata()).item() for line in axes.lines if line.get_marker() == "|"]
    np.testing.assert_equal(means, [6, 4.5, 3, np.nan, -3.5])
    assert tuple(np.asarray(axes.collections[-1].get_facecolor())[0, :3]) == COLOURS["random"]


def test_the_reference_is_a_line_through_all_and_rows_without_a_scale_say_so():
    (axes,) = choices(FOUND).axes
    (line,) = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert list(np.asarray(line.get_xdata())) == [6, 6]
    assert [text.get_text() for text in axes.texts] == ["no scale for 1 of 2", "no scale"]


def test_bands_part_the_choices():
    (axes,) = choices(FOUND).axes
    bands = sorted(patch.get_bbox().y0 for patch in axes.patches)  # pyright: ignore[reportAttributeAccessIssue]
    assert bands == [-0.5, 1.5, 2.5]
