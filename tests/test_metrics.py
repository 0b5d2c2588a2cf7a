import pytest
import torch
from conftest import unit_rows

from dctlib.metrics import interval, recovery


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
