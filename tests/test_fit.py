from typing import Any, cast

import pytest
import torch
from conftest import tiny_model, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from dctlib import CausalMap, FunctionMap, calibrate, fit_exponential, fit_linear
from dctlib.fit import exponential_weights, orthonormal_rows
from dctlib.metrics import recovery

D = 48


def planted(count, d=D, seed=0):
    """Σ a (exp⟨v, θ⟩ − 1) u with incoherent unit u and v."""
    U, V = unit_rows(count, d, seed=seed), unit_rows(count, d, seed=seed + 1)
    a = torch.linspace(1.5, 0.5, count, dtype=torch.float64)
    return U, V, FunctionMap(lambda t: (torch.expm1(t @ V.T) * a) @ U, d_source=d, d_target=d, dtype=torch.float64)


def linear(rank=D, d=D):
    singular = torch.logspace(1, -1, rank, dtype=torch.float64)
    U, V = orthonormal_rows(unit_rows(rank, d, seed=3)), orthonormal_rows(unit_rows(rank, d, seed=4))
    return U, V, singular, FunctionMap(lambda t: (t @ V.T * singular) @ U, d_source=d, d_target=d, dtype=torch.float64)


def test_linear_is_the_svd_of_the_jacobian():
    U, V, singular, cmap = linear()
    dct = fit_linear(cmap, num_factors=20)
    torch.testing.assert_close(dct.alpha, singular[:20])
    assert (dct.V * V[:20]).sum(1).abs().min() > 0.999
    assert (dct.U * U[:20]).sum(1).abs().min() > 0.999
    assert ((dct.V * V[:20]).sum(1).sign() == (dct.U * U[:20]).sum(1).sign()).all()


def test_linear_on_a_transformer_equals_the_dense_jacobian(tokenizer, texts):
    cmap = CausalMap.from_model(tiny_model("Llama"), tokenizer, texts, source=1, target=3, chunk_size=5)
    eye = torch.eye(32, dtype=torch.float64)
    dense = cmap.jvp(torch.zeros_like(eye), eye).T  # columns by forward mode; the fit takes rows by reverse mode
    dct = fit_linear(cmap, num_factors=32)
    torch.testing.assert_close(dct(eye).T, dense, rtol=1e-4, atol=1e-5)
    assert dct.source == 1
    assert dct.target == 3


def test_projected_linear_finds_the_leading_directions():
    _, V, _, cmap = linear()
    dct = fit_linear(cmap, num_factors=40, projections=32)
    torch.testing.assert_close(dct.V @ dct.V.T, torch.eye(40, dtype=torch.float64))
    leading = torch.linalg.svdvals(V[:3] @ dct.V[:8].T)
    assert leading.min() > 0.9
    image = cmap.jvp(torch.zeros_like(dct.V), dct.V)
    torch.testing.assert_close(dct.alpha[:, None] * dct.U, image)
    assert dct.alpha[:8].mean() > 3 * dct.alpha[32:].mean()


@pytest.mark.parametrize(("init", "iterations"), [("projected", 10), ("random", 100)])
def test_exponential_recovers_planted_factors(init, iterations):
    _, V, cmap = planted(16, d=256)
    dct = fit_exponential(cmap, num_factors=64, input_scale=calibrate(cmap), iterations=iterations, init=init)
    found = recovery(V, dct.V)
    assert found.mean_max_cosine > 0.95
    assert found.recovered > 0.8
    assert recovery(V, unit_rows(64, 256, seed=9)).mean_max_cosine < 0.3


def test_exponential_reconstructs_the_planted_map():
    _, V, cmap = planted(4)
    dct = fit_exponential(cmap, num_factors=4, input_scale=2.0, iterations=60, projections=4)
    theta = torch.cat([V, 0.5 * V, -V, unit_rows(8, D, seed=5)])
    truth = cmap(2.0 * theta)
    assert (dct(theta) - truth).norm() < 0.8 * truth.norm()  # σ has R = 1 inside: only the scale R·v is matched
    assert (dct(V) - cmap(2.0 * V)).norm() < 0.3 * cmap(2.0 * V).norm()


def test_factors_are_unit_and_the_record_is_complete():
    _, _, cmap = planted(6)
    dct = fit_exponential(cmap, num_factors=12, input_scale=2.0, iterations=7)
    for rows in (dct.U, dct.V):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(12, dtype=torch.float64))
    assert dct.objective.shape == dct.change.shape == (7,)
    assert dct.objective[-1] > dct.objective[0]
    assert dct.input_scale == 2.0
    assert dct.seconds > 0


def test_a_seed_fixes_every_bit_and_another_changes_them():
    _, _, cmap = planted(6)
    one, two, other = (
        fit_exponential(cmap, num_factors=8, input_scale=2.0, iterations=3, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(one.V, two.V)
    assert torch.equal(one.alpha, two.alpha)
    assert not torch.equal(one.V, other.V)


def test_the_global_generator_is_left_alone():
    _, _, cmap = planted(6)
    before = torch.random.get_rng_state()
    fit_exponential(cmap, num_factors=8, input_scale=2.0, iterations=2)
    fit_linear(cmap, num_factors=8, projections=8)
    assert torch.equal(before, torch.random.get_rng_state())


def test_chunks_agree():
    U, V, _ = planted(12)
    fits = []
    for chunk in (3, 64):
        cmap = FunctionMap(
            lambda t: torch.expm1(t @ V.T) @ U, d_source=D, d_target=D, dtype=torch.float64, chunk_size=chunk
        )
        fits.append(fit_exponential(cmap, num_factors=10, input_scale=2.0, iterations=4, projections=10))
    torch.testing.assert_close(fits[0].V, fits[1].V)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 12), copies=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_weights_are_finite_nonnegative_and_optimal_also_for_coinciding_factors(m, copies, seed):
    U, V = (unit_rows(m, 6, seed=seed + i).repeat(copies, 1) for i in range(2))
    b = torch.randn(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).repeat(copies)
    alpha = exponential_weights(U, V, b)
    K = (U @ U.T) * torch.expm1(V @ V.T)
    gradient = K @ alpha - b
    assert (alpha >= 0).all()
    assert torch.isfinite(alpha).all()
    if m <= 6:  # well conditioned: the conditions of Karush, Kuhn and Tucker hold
        assert (gradient > -1e-3 * (1 + b.abs().max())).all() or torch.linalg.cond(K[:m, :m]) > 1e4


def test_weights_solve_the_system_where_it_is_regular_and_positive():
    U, V = unit_rows(5, 20, seed=1), unit_rows(5, 20, seed=2)
    K = (U @ U.T) * torch.expm1(V @ V.T)
    alpha = torch.linspace(1, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(exponential_weights(U, V, K @ alpha), alpha, rtol=1e-4, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_orthonormal_rows_keep_the_span_and_turn_nothing_round(m, seed):
    rows = unit_rows(m, 8, seed=seed)
    Q = orthonormal_rows(rows)
    torch.testing.assert_close(Q @ Q.T, torch.eye(m, dtype=torch.float64))
    torch.testing.assert_close(rows @ Q.T @ Q, rows)
    assert ((rows * Q).sum(1) > 0).all()


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda cmap: fit_linear(cmap, num_factors=0), "num_factors=0"),
        (lambda cmap: fit_linear(cmap, num_factors=D + 1), "1 to 48"),
        (lambda cmap: fit_linear(cmap, num_factors=4, projections=0), "projections=0"),
        (lambda cmap: fit_exponential(cmap, num_factors=D + 1, input_scale=1.0), "1 to 48"),
        (lambda cmap: fit_exponential(cmap, num_factors=4, input_scale=0.0), "input_scale=0.0"),
        (lambda cmap: fit_exponential(cmap, num_factors=4, input_scale=float("nan")), "input_scale=nan"),
        (lambda cmap: fit_exponential(cmap, num_factors=4, input_scale=1.0, init=cast("Any", "zero")), "init='zero'"),
        (lambda cmap: fit_exponential(cmap, num_factors=4, input_scale=1e6), "not finite"),
    ],
)
def test_bad_options_are_named(fit, message):
    with pytest.raises(ValueError, match=message):
        fit(planted(6)[2])
