import pytest
import torch

from dctlib.maps.nonlinearity import activate
from dctlib.maps.synthetic import synthetic_map


@pytest.mark.parametrize("activation", ["linear", "quadratic", "exponential"])
def test_the_map_is_the_sum_of_its_factors(activation):
    planted = synthetic_map(3, 7, activation=activation, dtype=torch.float64)
    theta = torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.zeros(4, 7, dtype=torch.float64)
    for u, v, a in zip(planted.U, planted.V, planted.alpha, strict=True):
        expected += a * activate(theta @ v, activation)[:, None] * u
    torch.testing.assert_close(planted.cmap(theta), expected)
    torch.testing.assert_close(planted.V.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_the_linear_part_has_the_norm_asked_for():
    planted = synthetic_map(2, 400, activation="quadratic", linear=3.0)
    eye = torch.eye(400)
    T1 = planted.cmap.jvp(torch.zeros_like(eye), eye)
    assert T1.norm(dim=1).mean().item() == pytest.approx(3.0, rel=0.02)


def test_a_seed_fixes_it():
    assert torch.equal(synthetic_map(2, 5, seed=1).V, synthetic_map(2, 5, seed=1).V)
    assert not torch.equal(synthetic_map(2, 5, seed=1).V, synthetic_map(2, 5, seed=2).V)
