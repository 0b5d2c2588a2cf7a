import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from tiny import unit_rows

from dctlib.evaluation.anomaly import auroc, mahalanobis, projected_distance
from dctlib.maps.orthogonalise import orthonormal_rows

D = 12


def gaussian(n, *, seed, scale: float | torch.Tensor = 1.0, shift=0.0):
    return shift + scale * torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mahalanobis_is_the_textbooks_where_there_are_many_rows():
    scale = torch.linspace(0.5, 2, D, dtype=torch.float64)
    trusted, live = gaussian(20_000, seed=0, scale=scale, shift=5.0), gaussian(50, seed=1, scale=scale, shift=6.0)
    expected = ((live - 5.0) / scale).norm(dim=1)
    torch.testing.assert_close(mahalanobis(trusted, live), expected, rtol=0.05, atol=0)


def test_mahalanobis_of_fewer_rows_than_columns_is_finite_and_finds_what_is_odd():
    trusted, clean = gaussian(6, seed=0), gaussian(200, seed=1)
    odd = clean + 8 * unit_rows(1, D)
    assert torch.isfinite(mahalanobis(trusted, clean)).all()
    assert auroc(mahalanobis(trusted, clean), mahalanobis(trusted, odd)).low > 0.9


def test_what_lies_along_the_directions_is_seen_and_what_does_not_is_not():
    V = orthonormal_rows(unit_rows(4, D))
    trusted, clean = gaussian(100, seed=0, shift=3.0), gaussian(200, seed=1, shift=3.0)
    inside, outside = (projected_distance(trusted, clean + 6 * v, V[:2]) for v in (V[1], V[3]))
    usual = projected_distance(trusted, clean, V[:2])
    assert auroc(usual, inside).low > 0.95
    torch.testing.assert_close(outside, usual)
    everything = projected_distance(trusted, clean, orthonormal_rows(unit_rows(D, D)))
    torch.testing.assert_close(everything, (clean - trusted.mean(0)).norm(dim=1))


def test_directions_beat_the_whole_residual_where_it_is_noisy():
    V = unit_rows(1, D)
    noise = gaussian(400, seed=2, scale=5.0)
    noise -= noise @ V.T @ V
    quiet = 0.1 * gaussian(400, seed=3) @ V.T @ V
    usual = noise + quiet
    trusted, clean, odd = usual[:200], usual[200:], usual[200:] + V
    assert auroc(projected_distance(trusted, clean, V), projected_distance(trusted, odd, V)).mean > 0.99
    plain = torch.eye(D, dtype=torch.float64)
    assert auroc(projected_distance(trusted, clean, plain), projected_distance(trusted, odd, plain)).mean < 0.6


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 12), k=st.integers(2, 12), ties=st.booleans(), seed=st.integers(0, 10**6))
@example(n=2, k=9, ties=False, seed=205)  # all above: fractions of counts once added up to a little more than 1
def test_auroc_is_scikit_learns(n, k, ties, seed):
    scores = torch.randn(n + k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = scores.round() if ties else scores
    found = auroc(scores[:n], scores[n:])
    assert found.mean == pytest.approx(roc_auc_score([0] * n + [1] * k, scores.numpy()))
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_auroc_has_known_values_and_narrows():
    low, high = torch.arange(10.0), torch.arange(10.0) + 100
    assert auroc(low, high) == auroc(low + 1, high)
    assert (auroc(low, high).mean, auroc(high, low).mean, auroc(low, low).mean) == (1, 0, 0.5)
    quantiles = [torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n) for n in (10, 400)]
    few, many = (auroc(scores, scores + 1) for scores in quantiles)
    assert many.mean == pytest.approx(0.7602, abs=0.003)  # Φ(1/√2)
    assert many.high - many.low < (few.high - few.low) / 3


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="n of at least 2"):
        mahalanobis(gaussian(1, seed=0), gaussian(2, seed=0))
    with pytest.raises(ValueError, match="NaN"):
        mahalanobis(gaussian(3, seed=0) * torch.nan, gaussian(2, seed=0))
    with pytest.raises(ValueError, match=r"live \(2, 5\)"):
        projected_distance(gaussian(3, seed=0), unit_rows(2, 5), unit_rows(1, D))
    with pytest.raises(ValueError, match="1 clean"):
        auroc(torch.ones(1), torch.ones(3))
