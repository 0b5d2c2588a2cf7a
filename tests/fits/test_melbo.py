import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_near, tiny_model, unit_rows

from dctlib import CausalMap, FunctionMap, fit_linear
from dctlib.fits.compare import subspace_overlap
from dctlib.fits.melbo import melbo
from dctlib.fits.power_steering import power_steering
from dctlib.maps.counting import PassCounter
from dctlib.maps.orthogonalise import orthonormal_rows
from dctlib.maps.synthetic import synthetic_map

D = 16
SINGULAR = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
U, V = (orthonormal_rows(unit_rows(4, D, seed=seed)) for seed in (3, 4))


def linear(scale=1.0):
    return FunctionMap(lambda t: scale * (t @ V.T * SINGULAR) @ U, d_source=D, d_target=D, dtype=torch.float64)


def gain(cmap, theta):
    return cmap(theta).norm(dim=1)


def slope(cmap, V, R=0.0):
    """‖J v‖ of every row, where J is the Jacobian at R·v."""
    return cmap.jvp(R * V, V).norm(dim=1)


def saturating():
    """Δ(θ) = Σ cₗ tanh⟨vₗ, θ⟩ uₗ: the strongest at 0 saturates lowest, so a long θ ranks them the other way round."""
    height, slope = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, 2.0, 3.0], [9.0, 3.0, 1.0]))
    return FunctionMap(
        lambda t: (torch.tanh(t @ V[:3].T * slope) * height) @ U[:3], d_source=D, d_target=D, dtype=torch.float64
    )


def test_melbo_of_a_linear_map_finds_its_singular_vectors_in_order():
    found = melbo(linear(), num_vectors=3, input_scale=2.0, steps=200, learning_rate=0.03, progress=False)
    assert ((found * V[:3]).sum(1).abs() > 0.99).all()
    torch.testing.assert_close(gain(linear(), 2.0 * found), 2.0 * SINGULAR[:3], rtol=0.02, atol=0)


def test_melbo_climbs_to_what_is_strongest_at_its_scale():
    cmap = saturating()
    options = {"num_vectors": 1, "steps": 200, "learning_rate": 0.03, "progress": False}
    near, far = (melbo(cmap, input_scale=R, **options) for R in (0.01, 1.0))
    assert (near[0] @ V[0]).abs() > 0.99
    assert (far[0] @ V[2]).abs() > 0.8 > 0.3 > (far[0] @ V[0]).abs()
    assert gain(cmap, far) > cmap(torch.cat([V[:3], unit_rows(1000, D, seed=5)])).norm(dim=1).max()


def test_melbo_keeps_the_sign_that_changes_more():
    planted = synthetic_map(1, D, dtype=torch.float64)  # exp(x) − 1 grows on one side only
    options = {"num_vectors": 1, "input_scale": 3.0, "steps": 100, "learning_rate": 0.03, "progress": False}
    found = [melbo(planted.cmap, seed=seed, **options) for seed in range(6)]
    best = max(found, key=lambda each: gain(planted.cmap, 3.0 * each).item())
    assert best[0] @ planted.V[0] > 0.99


def test_a_step_of_melbo_turns_by_about_the_learning_rate():
    options = {"num_vectors": 1, "input_scale": 1.0, "learning_rate": 0.01, "progress": False}
    one, two = (melbo(saturating(), steps=steps, **options)[0] for steps in (1, 2))
    assert 0.005 < torch.acos(one @ two) < 0.015


def test_power_steering_equals_the_svd_of_the_jacobian():
    J = torch.randn(7, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cmap = FunctionMap(lambda t: torch.tanh(t @ J.T), d_source=D, d_target=7, dtype=torch.float64)
    found = power_steering(cmap, num_vectors=7, iterations=100, progress=False)
    _, singular, right = torch.linalg.svd(J, full_matrices=False)
    torch.testing.assert_close(slope(cmap, found), singular)
    torch.testing.assert_close((found * right).sum(1).abs(), torch.ones(7, dtype=torch.float64))


def test_power_steering_of_a_transformer_nears_its_linear_fit(tokenizer, texts):
    cmap = CausalMap.from_model(tiny_model("Llama"), tokenizer, texts[:1], source=1, target=3)
    exact = fit_linear(cmap, num_factors=2, progress=False)
    found = power_steering(cmap, num_vectors=4, progress=False)
    assert_near(slope(cmap, found)[:2], exact.alpha, 0.02)
    assert subspace_overlap(exact.V, found) > 0.95
    rough = power_steering(cmap, num_vectors=4, iterations=1, progress=False)
    assert (slope(cmap, rough).diff() < 0).all()  # strongest first


def test_fifteen_products_are_enough_where_singular_values_are_apart():
    counter = PassCounter(linear())
    found = power_steering(counter, num_vectors=2, progress=False)
    assert ((found * V[:2]).sum(1).abs() > 0.999).all()
    torch.testing.assert_close(slope(linear(), found), SINGULAR[:2], rtol=1e-3, atol=0)
    assert counter.forward == 2 * (7 * (2 + 1) + 2)  # a jvp costs two forward passes, a vjp one and a backward one
    assert counter.backward == 2 * 7


def test_power_steering_at_a_scale_uses_the_jacobian_there():
    def grows(t):  # Δ(θ) = 4 ⟨v₀, θ⟩ u₀ + 2 ‖θ‖² ⟨v₁, θ⟩ u₁: flat along v₁ at 0, and steep far out
        return 4 * (t @ V[:1].T) * U[0] + 2 * t.square().sum(-1, keepdim=True) * (t @ V[1:2].T) * U[1]

    cmap = FunctionMap(grows, d_source=D, d_target=D, dtype=torch.float64)
    at_zero, far = (power_steering(cmap, num_vectors=1, input_scale=R, iterations=40, progress=False) for R in (0, 3.0))
    assert (at_zero[0] @ V[0]).abs() > 0.99
    assert (far[0] @ V[1]).abs() > 0.99
    torch.testing.assert_close(slope(cmap, at_zero), torch.tensor([4.0], dtype=torch.float64))
    torch.testing.assert_close(slope(cmap, far, 3.0), torch.tensor([54.0], dtype=torch.float64))  # 2 R² + 4 R²


@settings(max_examples=12, deadline=None)
@given(count=st.integers(1, 6), seed=st.integers(0, 10**6), scale=st.floats(0.1, 5))
def test_rows_are_orthonormal_and_a_seed_fixes_them(count, seed, scale):
    cmap = synthetic_map(8, 6, seed=seed, dtype=torch.float64).cmap
    for method, options in ((melbo, {"steps": 5}), (power_steering, {}), (power_steering, {"iterations": 2})):
        one, two = (
            method(cmap, num_vectors=count, input_scale=scale, seed=seed, progress=False, **options) for _ in range(2)
        )
        assert one.shape == (count, 6)
        assert torch.equal(one, two)
        torch.testing.assert_close(one @ one.T, torch.eye(count, dtype=torch.float64))


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    melbo(linear(), num_vectors=2, input_scale=1.0, steps=2, progress=False)
    power_steering(linear(), num_vectors=2, progress=False)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda cmap: melbo(cmap, num_vectors=D + 1, input_scale=1.0), "1 to 16"),
        (lambda cmap: melbo(cmap, num_vectors=1, input_scale=0.0), "input_scale=0.0"),
        (lambda cmap: melbo(cmap, num_vectors=1, input_scale=1.0, steps=0), "got 0 steps"),
        (lambda cmap: melbo(cmap, num_vectors=1, input_scale=float("nan")), "input_scale=nan"),
        (lambda cmap: power_steering(cmap, num_vectors=0), "num_vectors=0"),
        (lambda cmap: power_steering(cmap, num_vectors=1, input_scale=-1.0), "input_scale=-1.0"),
        (lambda cmap: power_steering(cmap, num_vectors=1, iterations=0), "got 0 steps or iterations"),
    ],
)
def test_bad_options_are_named(method, message):
    with pytest.raises(ValueError, match=message):
        method(linear())


def test_a_map_that_overflows_is_named():
    steep = FunctionMap(lambda t: torch.exp(t.square()), d_source=D, d_target=D)
    for method in (melbo, power_steering):
        with pytest.raises(ValueError, match="not finite"):
            method(steep, num_vectors=1, input_scale=1e6, progress=False)
