import numpy as np
import pytest

from dctlib.paper.comparisons import paired_differences


def test_a_difference_averages_over_the_numbers_of_prompts_that_both_methods_have():
    table = lambda value, shuffles=3: np.full((shuffles, 4), float(value))  # noqa: E731
    scores = {"exponential": {1: table(5), 4: table(9)}, "linear": {1: table(2, 2)}, "random": {0: table(-1)}}
    found = {pair: difference.mean for pair, difference in paired_differences(scores).items()}
    expected = {"exponential - linear": 3, "exponential - random": 8, "linear - random": 3, "most - least": 4}
    assert found == pytest.approx(expected)
