from dataclasses import astuple
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from dctlib.evaluation.statistics import (
    crossed_interval,
    interval,
    paired_difference,
    pass_at_k,
    success_at_k,
)


def successes(m, n, seed, rate=0.3):
    return torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < rate


def test_ranked_vectors_count_from_the_first_that_succeeds():
    success = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0]]).bool()
    assert success_at_k(success).mean.tolist() == [0.25, 0.5, 0.75]
    assert success_at_k(success.flip(0)).mean.tolist() == [0.25, 0.75, 0.75]


def test_of_several_models_a_prompts_rate_is_their_mean():
    success = torch.stack([successes(3, 5, seed) for seed in (1, 2)])
    for curve in (success_at_k, pass_at_k):
        both, alone = curve(success), [curve(one) for one in success]
        torch.testing.assert_close(both.each, (alone[0].each + alone[1].each) / 2)
        torch.testing.assert_close(both.mean, both.each.mean(1))
        assert torch.equal(curve(success[:1]).high, alone[0].high)


def test_a_lead_is_paired_by_prompt():
    ours, theirs = (success_at_k(successes(3, 40, seed, rate)) for seed, rate in ((1, 0.6), (2, 0.2)))
    lead, paired = ours.paired_difference(theirs, 2), (ours.each[1] - theirs.each[1]).tolist()
    assert astuple(lead) == pytest.approx(astuple(interval(paired)))
    assert lead.mean == pytest.approx((ours.mean[1] - theirs.mean[1]).item())


def test_where_all_prompts_are_alike_some_may_be_otherwise():
    one_of_three = torch.tensor([True, False, False])[:, None, None].expand(3, 1, 16)
    flat, none = success_at_k(one_of_three), success_at_k(torch.zeros(1, 16, dtype=torch.bool))
    unseen = binomtest(0, 16).proportion_ci(method="wilson").high
    expected = {
        flat.at(1): (1 / 3, (1 - unseen) / 3, 1 / 3 + 2 / 3 * unseen),
        flat.paired_difference(none, 1): (1 / 3, 1 / 3 - 4 / 3 * unseen, 1 / 3 + 2 / 3 * unseen),
        none.paired_difference(none, 1): (0, -unseen, unseen),
    }
    for found, ends in expected.items():
        assert astuple(found) == pytest.approx(ends)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 6), n=st.integers(2, 5), seed=st.integers(0, 10**6))
def test_unordered_tries_are_averaged_over_all_choices_of_k(m, n, seed):
    success = successes(m, n, seed)
    found = pass_at_k(success).mean
    for k in range(1, m + 1):
        rates = [success[list(chosen)].any(0).double().mean() for chosen in combinations(range(m), k)]
        torch.testing.assert_close(found[k - 1], torch.stack(rates).mean())


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 8), n=st.integers(2, 30), seed=st.integers(0, 10**6))
def test_curves_rise_within_their_intervals_and_end_alike(m, n, seed):
    success = successes(m, n, seed)
    first, any_order = success_at_k(success), pass_at_k(success)
    for curve in (first, any_order):
        assert curve.mean.shape == curve.low.shape == curve.high.shape == (m,)
        assert (curve.mean.diff() >= -1e-12).all()
        resampled = (curve.mean > 0) & (curve.mean < 1)  # the others' ends are Wilson's, which may be wider
        for part in (curve.low, curve.high):
            assert (part[resampled].diff() >= -1e-12).all()
        assert ((curve.low <= curve.mean + 1e-12) & (curve.mean <= curve.high + 1e-12)).all()
    torch.testing.assert_close(first.mean[-1], any_order.mean[-1])


def test_intervals_are_those_of_the_mean_over_prompts():
    success = successes(3, 200, seed=1)
    curve = success_at_k(success)
    for k in (1, 3):
        expected = interval(success[:k].any(0).double().tolist())
        assert curve.mean[k - 1].item() == curve.at(k).mean == pytest.approx(expected.mean)
        assert curve.low[k - 1].item() == curve.at(k).low == pytest.approx(expected.low, abs=0.006)
        assert curve.high[k - 1].item() == curve.at(k).high == pytest.approx(expected.high, abs=0.006)
    assert torch.equal(success_at_k(success).low, curve.low)


def test_where_all_prompts_are_alike_the_interval_is_wilsons():
    success = torch.tensor([[0] * 15, [1] + [0] * 14, [1] * 15]).bool()
    found = success_at_k(success)
    none, one, every = zip(*(part.tolist() for part in (found.mean, found.low, found.high)), strict=True)
    wilson = binomtest(0, 15).proportion_ci(0.95, method="wilson")
    assert none == pytest.approx((0, 0, wilson.high))
    assert one[1] == 0 < one[2] < 0.3
    assert every == pytest.approx((1, 1 - wilson.high, 1))


def test_many_tries_stay_exact():
    success = torch.zeros(2000, 2, dtype=torch.bool)
    success[7] = True
    torch.testing.assert_close(pass_at_k(success).mean, torch.arange(1, 2001, dtype=torch.float64) / 2000)


@pytest.mark.parametrize("success", [torch.ones(3, 4), torch.ones(4).bool(), torch.ones(3, 1).bool()])
@pytest.mark.parametrize("curve", [success_at_k, pass_at_k])
def test_anything_but_a_matrix_of_bool_is_refused(curve, success):
    with pytest.raises(ValueError, match=r"expected bool \(m, n\)"):
        curve(success)


def test_interval_covers_the_mean_and_narrows():
    few, many = interval([0.0, 1.0] * 5), interval([0.0, 1.0] * 200)
    assert few.low < few.mean == 0.5 < few.high
    assert many.high - many.low < (few.high - few.low) / 3
    assert interval([0.0, 1.0] * 5) == few


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="at least 2"):
        interval([1.0])


def test_an_interval_over_rows_and_columns_is_wider_than_over_either():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(6, 1)) + rng.normal(size=(1, 9))
    both = crossed_interval(table)
    over_rows = crossed_interval(np.repeat(table.mean(1, keepdims=True), 9, axis=1))
    over_columns = crossed_interval(table.mean(0, keepdims=True))
    assert both.mean == pytest.approx(table.mean())
    assert both.high - both.low > max(each.high - each.low for each in (over_rows, over_columns))
    student = ttest_1samp(table.mean(1), 0).confidence_interval()
    assert (over_rows.low, over_rows.high) == pytest.approx((student.low, student.high))


def test_an_interval_over_a_few_rows_covers_the_mean_of_all():
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(3, 1)) + rng.normal(size=(1, 20)) for _ in range(300)]
    covered = [each.low < 0 < each.high for each in map(crossed_interval, tables)]
    assert 0.93 < sum(covered) / len(covered) < 1


@pytest.mark.parametrize("shape", [(3,), (1, 1), (0, 4), (4, 0)])
def test_a_table_without_two_values_has_no_interval(shape):
    with pytest.raises(ValueError, match="expected rows and columns with at least 2 values"):
        crossed_interval(np.zeros(shape))


def test_tables_are_paired_as_far_as_all_have_rows():
    ones, others = np.array([[3.0, 5.0], [4.0, 6.0], [90.0, 90.0]]), np.array([[1.0, 2.0], [2.0, 3.0]])
    found = paired_difference([(ones, others), (others, others)])
    assert found.mean == pytest.approx(np.mean([[1.0, 1.5], [1.0, 1.5]]))
