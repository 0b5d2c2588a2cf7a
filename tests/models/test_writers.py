"""Writers of the residual stream: what is found in each family and number type, and what is refused."""

import pytest
import torch
from families import family_model
from tiny import BLOCKS, FAMILIES, tiny_model

from dctlib.models.writers import residual_writers

# The last modules through which what a block adds passes.
SUBLAYERS = {
    "Gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "Gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "Olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "GPT2": ("attn", "mlp"),
    "GPTNeoX": ("post_attention_dropout", "post_mlp_dropout"),
    "Phi3": ("resid_attn_dropout", "resid_mlp_dropout"),
}
NORMED = ("Gemma2", "Gemma3", "Olmo2")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_sublayers_are_found_in_every_type_beside_a_huge_coordinate(family, dtype):
    model = tiny_model(family, dtype=dtype)
    model.get_input_embeddings().weight[:, 3] *= 100  # as in real models
    names = {id(module): path for path, module in model.named_modules()}
    found = [names[id(module)] for module in residual_writers(model).modules]
    expected = SUBLAYERS.get(family, ("self_attn", "mlp"))
    assert {path.rpartition(".")[2] for path in found[-2 * BLOCKS :]} == set(expected)
    assert len(found) == 1 + 2 * BLOCKS
    assert (residual_writers(model).projections is None) == (family in NORMED)


def test_norms_behind_sublayers_are_found_under_any_name():
    model = family_model("glm4")
    block = model.model.layers[0]
    assert set(residual_writers(model).modules[1:3]) == {block.post_self_attn_layernorm, block.post_mlp_layernorm}


@pytest.mark.parametrize("family", ["doge", "bert", "gemma3n_text"])
def test_a_stream_that_is_no_sum_is_refused(family):
    with pytest.raises(ValueError, match=r"not a sum of what its layers write|on one residual stream"):
        residual_writers(family_model(family))
