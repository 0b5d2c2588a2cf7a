import pytest
import torch
from tiny import tiny_model

from dctlib import CausalMap, fit_linear, fit_quadratic
from dctlib.maps.synthetic import synthetic_map
from dctlib.paper.experiments.post_faults import (
    als_without_curvature,
    columns_of_vh,
    pad_left_unmasked,
    projected_columns_of_vh,
)


def test_columns_of_vh_are_unit_but_not_singular_vectors(tokenizer, texts):
    cmap = CausalMap.from_model(tiny_model("Llama"), tokenizer, texts, source=1, target=3)
    exact = fit_linear(cmap, num_factors=32)
    wrong = columns_of_vh(exact, 4)
    torch.testing.assert_close(wrong.norm(dim=1), torch.ones(4, dtype=wrong.dtype))
    gain = [cmap.jvp(torch.zeros_like(V), V).norm(dim=1).mean().item() for V in (exact.V[:4], wrong)]
    assert gain[0] > 2 * gain[1]
    with pytest.raises(ValueError, match="square"):
        columns_of_vh(fit_linear(cmap, num_factors=4), 4)


def test_projected_columns_beyond_the_projections_lie_close_to_coordinate_axes():
    planted = synthetic_map(16, 256, activation="exponential", dtype=torch.float64)
    exact = fit_linear(planted.cmap, num_factors=256)
    wrong = projected_columns_of_vh(exact, 64, projections=16)
    torch.testing.assert_close(wrong.norm(dim=1), torch.ones(64, dtype=wrong.dtype))
    assert wrong[17:].abs().max(1).values.mean() > 0.7
    with pytest.raises(ValueError, match="square"):
        projected_columns_of_vh(fit_linear(planted.cmap, num_factors=4), 4)


def test_als_of_a_linear_map_finds_the_jacobian_and_misses_quadratic_factors():
    planted = synthetic_map(4, 48, activation="quadratic", linear=1.0, dtype=torch.float64)
    wrong = als_without_curvature(planted.cmap, num_factors=6, iterations=400, seed=0)
    leading = fit_linear(planted.cmap, num_factors=6).V
    assert torch.linalg.svdvals(wrong @ leading.T)[:5].min() > 0.95
    right = fit_quadratic(planted.cmap, num_factors=6, iterations=60, projections=6).V
    best = [(planted.V @ V.T).abs().max(1).values.mean().item() for V in (right, wrong)]
    assert best[0] > 0.95
    assert best[1] < 0.6


def test_padding_makes_lengths_equal_with_tokens_that_count(tokenizer):
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    texts = [" w1 w2 w3 w4", " w5 w6 w7"]
    padded = pad_left_unmasked(tokenizer, texts)
    assert padded[0] == texts[0]
    assert padded[1] == "<pad>" + texts[1]
