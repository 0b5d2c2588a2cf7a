import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, precision_score, recall_score

from dctlib.evaluation.agreement import agreement


def labels(n, seed=0):
    rng = np.random.default_rng(seed)
    labelled = rng.random(n) < 0.5
    return np.where(rng.random(n) < 0.8, labelled, ~labelled), labelled


def test_measures_are_those_of_scikit_learn_and_lie_in_their_intervals():
    judged, labelled = labels(60)
    found = agreement(judged.tolist(), labelled.tolist(), [number // 2 for number in range(60)])
    assert found["precision"].mean == pytest.approx(precision_score(labelled, judged))
    assert found["recall"].mean == pytest.approx(recall_score(labelled, judged))
    assert found["kappa"].mean == pytest.approx(cohen_kappa_score(labelled, judged))
    for each in found.values():
        assert each.low < each.mean < each.high


def test_completions_of_one_request_are_drawn_together():
    """Ten copies of each completion say no more than one."""
    judged, labelled = labels(20)
    judged_often, labelled_often = (np.repeat(each, 10).tolist() for each in (judged, labelled))
    once = agreement(judged.tolist(), labelled.tolist(), range(20))
    copied = agreement(judged_often, labelled_often, np.repeat(range(20), 10).tolist())
    of_own_requests = agreement(judged_often, labelled_often, range(200))
    for name, each in copied.items():
        assert vars(each) == pytest.approx(vars(once[name]))
        assert of_own_requests[name].high - of_own_requests[name].low < 0.6 * (each.high - each.low)


def test_what_is_nought_by_nought_counts_as_nought():
    found = agreement([False] * 4, [True, False] * 2, range(4))
    assert {each.mean for each in found.values()} == {0.0}
    assert agreement([True] * 4, [True] * 4, range(4))["kappa"].mean == 0.0


@pytest.mark.parametrize("lengths", [(3, 4, 4), (4, 4, 3), (0, 0, 0)])
def test_lengths_have_to_agree(lengths):
    judged, labelled, requests = lengths
    with pytest.raises(ValueError, match="expected equal lengths and at least 2 requests"):
        agreement([True] * judged, [True] * labelled, range(requests))


def test_one_request_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 requests"):
        agreement([True, False], [True, False], [0, 0])
