import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import unit_rows

from dctlib.fits.linalg import exponential_weights, quadratic_weights


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 12), copies=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_weights_are_optimal_also_for_coinciding_factors(m, copies, seed):
    """The conditions of Karush, Kuhn and Tucker, on K with its small eigenvalues raised as documented."""
    U, V = (unit_rows(m, 6, seed=seed + i).repeat(copies, 1) for i in range(2))
    b = torch.randn(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).repeat(copies)
    alpha = exponential_weights(U, V, b)
    values, vectors = torch.linalg.eigh((U @ U.T) * torch.expm1(V @ V.T))
    least = torch.finfo(torch.float32).eps * len(values) * values[-1]
    gradient = vectors @ (values.clamp(min=least) * (vectors.T @ alpha)) - b
    near = 1e-6 * (1 + alpha.max() + b.abs().max())
    assert (alpha >= 0).all()
    assert torch.isfinite(alpha).all()
    assert (gradient > -near).all()  # no weight is worth raising,
    assert (gradient[alpha > 0].abs() < near).all()  # nor, of those above 0, lowering
    torch.testing.assert_close(
        alpha.reshape(copies, m).sum(0), exponential_weights(U[:m], V[:m], b[:m]), rtol=1e-3, atol=1e-3
    )


def test_weights_solve_the_system_where_it_is_regular_and_positive():
    U, V = unit_rows(5, 20, seed=1), unit_rows(5, 20, seed=2)
    K = (U @ U.T) * torch.expm1(V @ V.T)
    alpha = torch.linspace(1, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(exponential_weights(U, V, K @ alpha), alpha, rtol=1e-4, atol=1e-6)


def test_quadratic_weights_minimise_the_error_of_the_dense_second_derivative():
    U, V = unit_rows(5, 8, seed=1), unit_rows(5, 8, seed=2)
    T2 = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    T2 = (T2 + T2.transpose(1, 2)) / 2 + 5 * torch.einsum("li,lj,lk->ijk", U, V, V)  # so that all weights are positive
    basis = 2 * torch.einsum("li,lj,lk->ijkl", U, V, V).reshape(-1, 5)
    expected = torch.linalg.lstsq(basis, T2.reshape(-1)).solution
    assert (expected > 0).all()
    found = quadratic_weights(U, V, torch.einsum("ijk,li,lj,lk->l", T2, U, V, V))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_factors_that_vanish_have_no_weights():
    with pytest.raises(ValueError, match="its factors vanish"):
        quadratic_weights(torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(3))
