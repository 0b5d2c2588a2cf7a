import pytest
import torch
from tiny import unit_rows

from dctlib.evaluation.statistics import interval
from dctlib.fits.compare import recovery, similarity


def test_interval_covers_the_mean_and_narrows():
    few, many = interval([0.0, 1.0] * 5), interval([0.0, 1.0] * 200)
    assert few.low < few.mean == 0.5 < few.high
    assert many.high - many.low < (few.high - few.low) / 3
    assert interval([0.0, 1.0] * 5) == few


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="at least 2"):
        interval([1.0])


def test_recovery_ignores_sign_and_order():
    true = unit_rows(4, 10)
    found = torch.cat([-true[[2, 0]], unit_rows(5, 10, seed=8), true[[3]]])
    result = recovery(true, found)
    assert result.recovered == 0.75
    assert 0.75 < result.mean_max_cosine < 1


def test_similarity_of_orthogonal_and_of_equal_directions():
    apart = similarity(torch.eye(3, 5))
    assert (apart.condition_number, apart.mean_abs_cosine, apart.sd_abs_cosine) == pytest.approx((1, 0, 0))
    half = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-0.6, 0.8]])
    found = similarity(half)
    assert found.mean_abs_cosine == pytest.approx((0.6 + 0.6 + 0.28) / 3)
    assert similarity(half[:2]).condition_number == pytest.approx((1.6 / 0.4) ** 0.5)
    with pytest.raises(ValueError, match="at least 2"):
        similarity(half[:1])
