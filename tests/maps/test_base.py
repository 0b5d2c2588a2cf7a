from typing import Any

import pytest
import torch
from tiny import unit_rows

from dctlib import FunctionMap

D, E = 6, 5
A, B, C = unit_rows(9, D, seed=1), unit_rows(9, E, seed=2), unit_rows(1, E, seed=3)


def function(theta):
    return torch.tanh(theta @ A.T + 0.3).square() @ B + C


def dense_hessian(function, width, theta):
    """T2 by autograd's own dense Hessians, (width, d, d)."""
    rows: list[Any] = [
        torch.autograd.functional.hessian(lambda t, i=i: function(t[None])[0, i], theta) for i in range(width)
    ]
    return torch.stack(rows)


@pytest.fixture
def fmap():
    return FunctionMap(function, d_source=D, d_target=E, dtype=torch.float64, chunk_size=2)


def test_value_is_the_difference_from_zero(fmap):
    theta = unit_rows(5, D)
    torch.testing.assert_close(fmap(theta), function(theta) - function(torch.zeros(1, D, dtype=torch.float64)))


def test_products_equal_dense_autograd(fmap):
    theta, v, w, u = (unit_rows(3, width, seed=i) for i, width in enumerate((D, D, D, E)))
    at_zero = torch.zeros(D, dtype=torch.float64)
    hessian = dense_hessian(function, E, at_zero)
    slope_at_zero = torch.autograd.functional.jacobian(lambda t: function(t[None])[0], at_zero)
    torch.testing.assert_close(fmap.vjp_at_zero(u), u @ slope_at_zero)
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda t: function(t[None])[0], theta[row])
        torch.testing.assert_close(fmap.jvp(theta, v)[row], jacobian @ v[row])
        torch.testing.assert_close(fmap.vjp(theta, u)[row], jacobian.T @ u[row])
        torch.testing.assert_close(
            fmap.second_derivative(v, w)[row], torch.einsum("ijk,j,k->i", hessian, v[row], w[row])
        )
        torch.testing.assert_close(
            fmap.second_derivative_vjp(u, v)[row], torch.einsum("ijk,i,j->k", hessian, u[row], v[row])
        )


def test_function_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected \(1, 4\)"):
        FunctionMap(function, d_source=D, d_target=4, dtype=torch.float64)


def test_layer_norm_has_right_second_derivatives():
    norm = torch.nn.LayerNorm(D, dtype=torch.float64)
    shift = unit_rows(1, D, seed=9)
    fmap = FunctionMap(lambda theta: norm(theta + shift), d_source=D, d_target=D, dtype=torch.float64)
    v = unit_rows(1, D, seed=4)
    hessian = dense_hessian(lambda t: norm(t + shift), D, torch.zeros(D, dtype=v.dtype))
    torch.testing.assert_close(fmap.second_derivative(v, v)[0], torch.einsum("ijk,j,k->i", hessian, v[0], v[0]))


@pytest.mark.parametrize("chunk_size", [8, 1000])
def test_a_device_that_runs_out_of_memory_gets_smaller_chunks(chunk_size):
    sizes = []

    def cramped(theta):
        sizes.append(len(theta))
        if len(theta) > 3:
            raise torch.OutOfMemoryError("no room")
        return function(theta)

    fmap = FunctionMap(cramped, d_source=D, d_target=E, dtype=torch.float64, chunk_size=chunk_size)
    theta = unit_rows(9, D)
    with pytest.warns(UserWarning, match="going on with chunks of 2"):
        found = fmap(theta)
    torch.testing.assert_close(found, function(theta) - function(torch.zeros(1, D, dtype=torch.float64)))
    assert sizes == [1, min(chunk_size, 9), 4, 2, 2, 2, 2, 1]  # the clean one first; no try as large as what failed
    assert fmap.chunk_size == 2


def test_a_device_without_room_for_one_factor_says_what_to_change():
    def full(theta):
        if theta.abs().sum() > 0:
            raise torch.OutOfMemoryError("no room")
        return function(theta)

    fmap = FunctionMap(full, d_source=D, d_target=E, dtype=torch.float64, chunk_size=1)
    with pytest.raises(ValueError, match="fewer or shorter prompts"):
        fmap(unit_rows(2, D))


@pytest.mark.parametrize(("dtype", "found"), [(torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_a_function_says_itself_what_it_computes_in(dtype, found):
    A = torch.eye(D, dtype=dtype)
    fmap = FunctionMap(lambda theta: theta @ A, d_source=D, d_target=D)
    assert fmap.dtype == fmap(torch.ones(2, D)).dtype == found


def test_what_a_function_raises_is_raised():
    def broken(_theta):
        raise RuntimeError("no such thing")

    options: Any
    for options in ({}, {"dtype": torch.float32}):
        with pytest.raises(RuntimeError, match="no such thing"):
            FunctionMap(broken, d_source=D, d_target=D, **options)


def test_a_function_that_writes_to_its_argument_leaves_the_callers_alone():
    fmap = FunctionMap(lambda theta: theta.mul_(2).sin(), d_source=D, d_target=D)
    theta = torch.ones(2, D)
    fmap(theta)
    assert torch.equal(theta, torch.ones(2, D))


def test_a_chunk_has_at_least_one_row():
    fmap = FunctionMap(torch.sin, d_source=D, d_target=D, chunk_size=0)
    with pytest.raises(ValueError, match="chunk_size=0, expected at least 1"):
        fmap(torch.ones(2, D))
