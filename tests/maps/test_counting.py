import pytest
import torch
from tiny import tiny_model, unit_rows

from dctlib import CausalMap, FunctionMap, calibrate, fit_exponential
from dctlib.maps.counting import PassCounter


def counted_map():
    V = unit_rows(3, 6, seed=1)
    return FunctionMap(lambda t: torch.expm1(t @ V.T), d_source=6, d_target=3, dtype=torch.float64, chunk_size=2)


THETA, COTANGENT = unit_rows(5, 6), unit_rows(5, 3, seed=2)


@pytest.mark.parametrize(
    ("product", "forward", "backward"),
    [
        (lambda cmap: cmap(THETA), 5, 0),
        (lambda cmap: cmap.vjp(THETA, COTANGENT), 5, 5),
        (lambda cmap: cmap.vjp_at_zero(COTANGENT), 3, 5),
        (lambda cmap: torch.cat(cmap.value_and_vjp(THETA, COTANGENT), 1), 5, 5),
        (lambda cmap: cmap.jvp(THETA, THETA), 10, 0),
        (lambda cmap: cmap.second_derivative(THETA, THETA), 20, 0),
        (lambda cmap: cmap.second_derivative_vjp(COTANGENT, THETA), 10, 10),
    ],
)
def test_every_product_is_the_maps_own_and_counted(product, forward, backward):
    cmap = counted_map()
    counter = PassCounter(cmap)
    torch.testing.assert_close(product(counter), product(cmap))
    assert (counter.forward, counter.backward) == (forward, backward)


def test_a_fit_through_a_counter_is_the_same_fit(tokenizer, texts):
    cmap = CausalMap.from_model(tiny_model("Llama"), tokenizer, texts, source=1, target=3)
    counter = PassCounter(cmap)
    options = {"num_factors": 4, "iterations": 3, "projections": 2, "tolerance": 0, "progress": False}
    R = calibrate(counter)
    counter.forward = counter.backward = 0
    dct = fit_exponential(counter, input_scale=R, **options)
    assert torch.equal(dct.V, fit_exponential(cmap, input_scale=calibrate(cmap), **options).V)
    assert (dct.source, dct.target) == (1, 3)
    # Algorithm 1′: two rows of the Jacobian from one pass, four jvps; three iterations; the weights.
    assert (counter.forward, counter.backward) == (1 + 2 * 4 + 3 * 4 + 4, 2 + 3 * 4)
