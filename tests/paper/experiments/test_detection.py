import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import unit_rows

from dctlib.evaluation.anomaly import auroc, mahalanobis
from dctlib.evaluation.statistics import interval
from dctlib.maps.orthogonalise import orthonormal_rows
from dctlib.paper.experiments.detection import (
    auroc_contrasts,
    detector_scores,
    difference_to_detector,
    mean_over_organisms,
)

D = 24
NAMES = ["factors, distance", "factors, Mahalanobis", "random, distance", "random, Mahalanobis"]
NAMES += ["residual, Mahalanobis"]


def gaussian(n, seed):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def test_what_moves_along_the_factors_they_see_better_than_random_directions_and_the_whole():
    V = orthonormal_rows(unit_rows(3, D, dtype=torch.float32))
    trusted, clean, odd = gaussian(40, 0), gaussian(200, 1), gaussian(200, 2) + 3 * V[0]
    found = detector_scores(trusted, torch.cat([clean, odd]), V, seed=0)
    assert list(found) == NAMES
    area = {name: auroc(scores[:200], scores[200:]).mean for name, scores in found.items()}
    assert min(area["factors, distance"], area["factors, Mahalanobis"]) > 0.9
    assert max(area["random, distance"], area["random, Mahalanobis"], area["residual, Mahalanobis"]) < 0.85


def test_the_random_ones_are_as_many_and_follow_the_seed_and_the_rest_does_not():
    V, trusted, live = unit_rows(D, D, dtype=torch.float32), gaussian(60, 0), gaussian(5, 1)
    one, two = (detector_scores(trusted, live, V[:4], seed=seed) for seed in (0, 1))
    differs = [name for name in NAMES if not torch.equal(one[name], two[name])]
    assert differs == ["random, distance", "random, Mahalanobis"]
    torch.testing.assert_close(one["residual, Mahalanobis"], mahalanobis(trusted, live))
    everything = detector_scores(trusted, live, torch.eye(D), seed=0)
    torch.testing.assert_close(everything["factors, Mahalanobis"], one["residual, Mahalanobis"], rtol=1e-4, atol=0)


def test_a_detector_of_odd_phrases_is_told_from_one_of_triggers():
    clean, odd, triggered = torch.arange(10.0), torch.arange(10.0) + 20, torch.arange(10.0) + 40
    means = {name: area.mean for name, area in auroc_contrasts(clean, odd, odd).items()}
    assert means == {"trigger against clean": 1, "trigger against decoy": 0.5, "decoy against clean": 1}
    means = {name: area.mean for name, area in auroc_contrasts(clean, triggered, clean).items()}
    assert means == {"trigger against clean": 1, "trigger against decoy": 1, "decoy against clean": 0.5}
    assert auroc_contrasts(clean, odd, triggered)["trigger against decoy"].mean == 0


@settings(max_examples=10, deadline=None)
@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_means_over_organisms_have_an_interval_from_three_on(values):
    rows = [
        {"organism": str(i), "end": end, "detector": "d", "contrast": "c", "mean": value}
        for i, value in enumerate(values)
        for end in ("target", "source")
    ]
    found = mean_over_organisms(pd.DataFrame(rows))
    assert found["end"].tolist() == ["target", "source"]
    mean, low, high = found.loc[0, ["mean", "low", "high"]]
    if len(values) > 2:
        assert (mean, low, high) == tuple(vars(interval(values)).values())
    else:
        assert mean == pytest.approx(sum(values) / len(values))
        assert math.isnan(low) and math.isnan(high)


def test_a_gain_over_the_residual_is_taken_organism_by_organism():
    areas = {
        "residual, Mahalanobis": [0.5, 0.7, 0.9],
        "factors, distance": [0.6, 0.8, 1.0],
        "random, distance": [0.9] * 3,
    }
    rows = [
        {
            "organism": str(i),
            "end": end,
            "detector": detector,
            "contrast": "c",
            "mean": value + (end == "target") * i / 9,
        }
        for detector, of in areas.items()
        for end in ("source", "target")
        for i, value in enumerate(of)
    ]
    found = difference_to_detector(pd.DataFrame(rows).sample(frac=1, random_state=0), "residual, Mahalanobis")
    assert set(found["detector"]) == {"factors, distance", "random, distance"}
    gains = found.set_index(["end", "detector"])
    for end in ("source", "target"):  # what an organism adds to both cancels
        assert gains.loc[(end, "factors, distance"), ["mean", "low", "high"]].tolist() == pytest.approx([0.1] * 3)
        assert gains.loc[(end, "random, distance"), "mean"] == pytest.approx(0.2)
        assert gains.loc[(end, "random, distance"), "low"] < 0.1 < gains.loc[(end, "random, distance"), "high"]


def test_no_organism_gives_no_row_and_shapes_are_checked():
    columns = ["organism", "end", "detector", "contrast", "mean"]
    assert mean_over_organisms(pd.DataFrame(columns=columns)).empty
    with pytest.raises(ValueError, match=r"expected \(m, 24\)"):
        detector_scores(gaussian(5, 0), gaussian(5, 1), torch.eye(D + 1), seed=0)
    with pytest.raises(ValueError, match="n of at least 2"):
        detector_scores(gaussian(1, 0), gaussian(5, 1), torch.eye(D), seed=0)
