import numpy as np
import pytest

from dctlib.paper.claims import published_numbers
from dctlib.paper.comparisons import METHODS, paired_differences, published_differences, published_winners
from dctlib.paper.params import FITTED


def test_parameters_name_the_same_methods():
    assert tuple(METHODS) == FITTED


def test_a_difference_averages_over_the_numbers_of_prompts_that_both_methods_have():
    table = lambda value, shuffles=3: np.full((shuffles, 4), float(value))  # noqa: E731
    scores = {"exponential": {1: table(5), 4: table(9)}, "linear": {1: table(2, 2)}, "random": {0: table(-1)}}
    found = {pair: difference.mean for pair, difference in paired_differences(scores).items()}
    expected = {"exponential - linear": 3, "exponential - random": 8, "linear - random": 3, "most - least": 4}
    assert found == pytest.approx(expected)


def test_the_published_scores_give_the_differences_that_their_means_give():
    found = published_differences()
    post = published_numbers()["sample_complexity"]
    for pair, difference in found.items():
        if pair != "most - least":
            better, worse = ([mean for mean, _ in post[method]] for method in pair.split(" - "))
            assert difference.mean == pytest.approx(sum(better) / 6 - sum(worse) / 6, abs=0.02)
    gap = found["exponential - quadratic"]
    assert (gap.low, gap.mean, gap.high) == pytest.approx((1.64, 2.65, 3.66), abs=0.01)


def test_winners_of_the_published_quadratic_and_projected_fits_are_among_their_first_directions():
    found = published_winners()
    assert found["shuffles"].tolist() == [60] * 4
    assert found["among_first"].to_dict() == {"exponential": 0, "quadratic": 56, "linear_projected": 57, "linear": 1}
    assert found.loc["quadratic", "expected"] == 60 * 8 / 256 and found.loc["exponential", "expected"] == 60 * 8 / 512
    assert found.loc["quadratic", "p_value"] < 1e-60 < 0.5 < found.loc["exponential", "p_value"]
