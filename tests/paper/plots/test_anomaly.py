from typing import Any

import numpy as np
import pandas as pd
import pytest

from dctlib.paper.experiments.detection import mean_over_organisms
from dctlib.paper.plots.intervals import anomaly
from dctlib.paper.plots.style import COLOURS, save_figure

CONTRASTS = ["trigger against clean", "trigger against decoy"]
DETECTORS = ["factors, distance", "random, distance", "residual, Mahalanobis"]
ORGANISMS = {"backdoor-0": 0.9, "backdoor-1": 0.8, "backdoor-2": 0.7, "clean-0": 0.55}
AUROCS = pd.DataFrame(
    [
        {"organism": organism, "end": end, "detector": detector, "contrast": contrast, "mean": mean - place * 0.3}
        for organism, mean in ORGANISMS.items()
        for end in ("source", "target")
        for detector in DETECTORS
        for place, contrast in enumerate(CONTRASTS)
    ]
).assign(planted=lambda table: table["organism"] != "clean-0")


def draw_anomaly(aurocs=AUROCS):
    return anomaly(aurocs, mean_over_organisms(pd.DataFrame(aurocs[aurocs["planted"]])))


def test_the_figure_is_the_same_each_time(tmp_path):
    for run in ("one", "two"):
        save_figure(draw_anomaly(), tmp_path / run)
    for suffix in (".png", ".svg"):
        one, two = ((tmp_path / run).with_suffix(suffix).read_bytes() for run in ("one", "two"))
        assert one == two
        assert len(one) > 2000


def test_every_detector_has_a_row_under_its_layer_with_its_mean():
    left, right = draw_anomaly().axes
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels == ["source layer, V", *DETECTORS, "target layer, U", *DETECTORS]
    assert [panel.get_title() for panel in (left, right)] == CONTRASTS
    for panel, mean in ((left, "0.80"), (right, "0.50")):
        assert [text.get_text() for text in panel.texts] == [mean] * 6 + ["chance "]
    assert left.get_yticklabels()[2].get_color() == COLOURS["random"]


def test_organisms_with_a_secret_are_filled_and_clean_ones_hollow():
    for panel, less in zip(draw_anomaly().axes, (0, 0.3), strict=True):
        dots = [(points, np.asarray(points.get_offsets())[:, 0]) for points in panel.collections]
        filled = [sorted(x) for points, x in dots if len(points.get_facecolor())]
        hollow = [x for points, x in dots if hasattr(points, "get_sizes") and not len(points.get_facecolor())]
        assert [x for x in filled if len(x) == 3] == [pytest.approx([0.7 - less, 0.8 - less, 0.9 - less])] * 6
        assert [list(x) for x in hollow] == [pytest.approx([0.55 - less])] * 6


def test_intervals_stand_only_where_there_are_organisms_for_them():
    three, one = draw_anomaly(), draw_anomaly(pd.DataFrame(AUROCS[AUROCS["organism"] == "backdoor-0"]))
    for figure, spans in ((three, True), (one, False)):
        containers: Any = figure.axes[0].containers
        bars = [np.asarray(bar.lines[2][0].get_segments()) for bar in containers]
        assert len(bars) == 6
        assert [bar.size > 0 and bool(np.isfinite(bar).all()) for bar in bars] == [spans] * 6
