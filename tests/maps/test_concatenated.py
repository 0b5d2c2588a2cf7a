from typing import Any, cast

import pytest
import torch
from tiny import assert_near, full_model_map, tiny_model, unit_rows
from torch.autograd.functional import hessian, jacobian

from dctlib import CausalMap, calibrate, fit_exponential, fit_linear, fit_quadratic
from dctlib.runs.cache import cached_fit

D = 32
SLICE: dict[str, Any] = {"source": 1, "target": 3}
PROMPTS = {
    "apart": ["w0 w1 w2 w3 w4 w5 w6 w7 w8", "w9 w10 w11 w12", "w13 w14 w15 w16 w17 w18 w19"],
    "in one tree": ["w0 w1 w2 w3 w4", "w0 w1 w2 w5 w6 w7", "w0 w1 w8 w9"],
    "of both kinds": ["w9 w10 w11 w12", "w0 w1 w2 w3 w4", "w0 w1 w2 w5 w6 w7"],
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama", attention="eager")  # whose derivatives autograd takes twice


@pytest.fixture(params=PROMPTS)
def prompts(request):
    return PROMPTS[request.param]


def concatenated(model, tokenizer, prompts, **options):
    return CausalMap.from_model(model, tokenizer, prompts, **{**SLICE, **options}, reduction="concatenate")


def apart(model, tokenizer, prompts, positions=3):
    """Δ_concat of one θ, (d,) → (n d,), by whole forward passes of the hooked model: no code of dctlib."""
    each = [full_model_map(model, tokenizer, [prompt], positions=positions, **SLICE) for prompt in prompts]
    return lambda theta: torch.cat([delta(theta) for delta in each])


@pytest.mark.parametrize("positions", [1, 3])
def test_values_are_those_of_the_hooked_model_prompt_by_prompt(model, tokenizer, prompts, positions):
    cmap = concatenated(model, tokenizer, prompts, positions=positions)
    theta = 3 * unit_rows(4, D)
    expected = torch.stack([apart(model, tokenizer, prompts, positions)(row) for row in theta])
    assert cmap(theta).shape == (4, 3 * D) == (4, cmap.d_target)
    assert_near(cmap(theta), expected, 1e-6)


def test_first_derivatives_equal_dense_autograd(model, tokenizer, prompts):
    cmap = concatenated(model, tokenizer, prompts)
    cmap.chunk_size = 2
    theta, v, u = unit_rows(3, D), unit_rows(3, D, seed=1), unit_rows(3, 3 * D, seed=2)
    delta = apart(model, tokenizer, prompts)
    dense = torch.stack([torch.as_tensor(jacobian(delta, row)) for row in theta])
    assert_near(cmap.jvp(theta, v), torch.einsum("lij,lj->li", dense, v), 1e-4)
    values, gradients = cmap.value_and_vjp(theta, u)
    assert_near(gradients, torch.einsum("lij,li->lj", dense, u), 1e-4)
    torch.testing.assert_close(values, cmap(theta))
    torch.testing.assert_close(cmap.vjp(theta, u), gradients)


def test_second_derivatives_equal_dense_autograd(model, tokenizer, prompts):
    cmap = concatenated(model, tokenizer, prompts)
    v, w, u = unit_rows(2, D, seed=1), unit_rows(2, D, seed=2), unit_rows(2, 3 * D, seed=3)
    delta, zero = apart(model, tokenizer, prompts), torch.zeros(D, dtype=torch.float64)
    dense = torch.stack([torch.as_tensor(hessian(lambda t, c=c: c @ delta(t), zero)) for c in u])
    found = (u * cmap.second_derivative(v, w)).sum(1)
    assert_near(found, torch.einsum("ljk,lj,lk->l", dense, v, w), 1e-3)
    assert_near(cmap.second_derivative_vjp(u, v), torch.einsum("ljk,lj->lk", dense, v), 1e-3)


def test_the_mean_of_its_blocks_is_the_averaged_map_and_so_are_the_other_numbers(model, tokenizer, prompts):
    cmap = concatenated(model, tokenizer, prompts)
    averaged = CausalMap.from_model(model, tokenizer, prompts, **SLICE)
    theta = 3 * unit_rows(2, D)
    assert_near(cmap(theta).unflatten(1, (3, D)).mean(1), averaged(theta), 1e-6)
    assert (cmap.scale, cmap.chunk_size, cmap.d_source) == (averaged.scale, averaged.chunk_size, averaged.d_source)


def test_one_prompt_is_the_causal_map_of_it_and_so_is_its_fit(model, tokenizer, texts):
    cmap, averaged = (of(model, tokenizer, texts[:1], **SLICE) for of in (concatenated, CausalMap.from_model))
    R = calibrate(averaged)
    assert calibrate(cmap) == pytest.approx(R, rel=1e-4)
    settings = {"num_factors": 5, "input_scale": R, "iterations": 3, "progress": False}
    found, expected = fit_exponential(cmap, **settings), fit_exponential(averaged, **settings)
    torch.testing.assert_close(found.V, expected.V, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.U, expected.U, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fit", [fit_linear, fit_quadratic, lambda *a, **k: fit_exponential(*a, input_scale=5.0, **k)])
def test_every_fit_runs_on_it(model, tokenizer, texts, fit):
    cmap = concatenated(model, tokenizer, texts)
    dct = fit(cmap, num_factors=4, progress=False)
    assert (dct.U.shape, dct.V.shape, dct.source, dct.target) == ((4, 3 * D), (4, D), 1, 3)
    torch.testing.assert_close(dct.U.norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_it_keeps_what_an_average_loses(model, tokenizer, texts):
    """Prompts count by what happens to each: the leading direction makes the sum of squares largest."""
    cmap = concatenated(model, tokenizer, texts)
    averaged = CausalMap.from_model(model, tokenizer, texts, **SLICE)
    zero = torch.zeros(1, D, dtype=torch.float64)
    gains = [cmap.jvp(zero, fit_linear(of, num_factors=1, progress=False).V).norm() for of in (cmap, averaged)]
    assert gains[0] > gains[1]


def test_fits_of_it_are_remembered_apart_from_those_of_the_average(model, tokenizer, texts, tmp_path):
    cmap, averaged = (of(model, tokenizer, texts[:1], **SLICE) for of in (concatenated, CausalMap.from_model))
    again = concatenated(model, tokenizer, texts[:1])
    other = concatenated(model, tokenizer, texts[1:2])
    assert cmap.digest == again.digest
    assert len({cmap.digest, averaged.digest, other.digest}) == 3
    for of in (cmap, averaged, again):
        cached_fit(tmp_path, fit_exponential, of, num_factors=2, input_scale=5.0, iterations=1)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("theta", "cotangent", "message"),
    [((2, D), (2, D), r"expected \(m, 96\)"), ((2, D), (3, 3 * D), "one row of each"), ((2, 3 * D), (2, 3 * D), "32")],
)
def test_shapes_are_checked(model, tokenizer, texts, theta, cotangent, message):
    cmap = concatenated(model, tokenizer, texts)
    with pytest.raises(ValueError, match=message):
        cmap.vjp(torch.zeros(*theta), torch.zeros(*cotangent))


def test_another_reduction_is_refused(model, tokenizer, texts):
    with pytest.raises(ValueError, match="reduction='sum', expected one of"):
        CausalMap.from_model(model, tokenizer, texts, **SLICE, reduction=cast("Any", "sum"))
