"""A model whose blocks do not all lie where their inputs do: here on disk, fetched by accelerate when they are called.

Several GPUs differ in the device alone; no machine that we have had can test that.
"""

from typing import Any

import pytest
import torch
from tiny import assert_near, tiny_model, unit_rows
from transformers import AutoModelForCausalLM

from dctlib import CausalMap, fit_exponential, load_model, score_vectors, steer
from dctlib.models.fingerprint import model_digest
from dctlib.steering.effects import effects
from dctlib.steering.generation import generate_completions
from dctlib.steering.hooks import ablated_copy

AT: dict[str, Any] = {"source": 1, "target": 3}


@pytest.fixture(scope="module", params=["the slice", "all but the embeddings"])
def pair(request, tmp_path_factory, tokenizer):
    """A model in memory, and the same with blocks on disk."""
    folder, offload = (tmp_path_factory.mktemp(name) for name in ("model", "offload"))
    tiny_model("Llama", dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    memory = load_model(folder, dtype="float32")[0]
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    where |= {
        f"model.layers.{block}": "disk" if block in (1, 2) or "all" in request.param else "cpu" for block in range(4)
    }
    where |= dict.fromkeys(["model.norm", "lm_head"], "disk" if "all" in request.param else "cpu")
    options = {"dtype": torch.float32, "device_map": where, "offload_folder": str(offload)}
    disk = AutoModelForCausalLM.from_pretrained(folder, **options).eval().requires_grad_(False)
    assert disk.model.layers[1].mlp.down_proj.weight.device.type == "meta"  # nothing is held between calls
    return memory, disk


def test_products_of_the_map_are_the_same_and_second_derivatives_are_refused(pair, tokenizer, texts):
    one, other = (CausalMap.from_model(model, tokenizer, texts, **AT) for model in pair)
    v, w = unit_rows(2, 5, 32, dtype=torch.float32)
    assert_near(other(3 * v), one(3 * v), 1e-5)
    assert_near(other.vjp(v, w), one.vjp(v, w), 1e-5)
    assert_near(other.vjp_at_zero(w), one.vjp_at_zero(w), 1e-5)
    assert_near(other.jvp(v, w), one.jvp(v, w), 1e-5)
    assert other.digest == one.digest
    for product in (other.second_derivative, other.second_derivative_vjp):
        with pytest.raises(ValueError, match="offloaded in part"):
            product(v, w)


def test_copies_of_offloaded_blocks_are_refused(pair, tokenizer, texts):
    with pytest.raises(ValueError, match="expected a model loaded whole"):
        CausalMap.from_model(pair[1], tokenizer, texts, **AT, device="cpu")


def test_an_edit_of_offloaded_weights_is_refused(pair):
    with pytest.raises(ValueError, match="weights are offloaded, which no edit reaches"):
        ablated_copy(pair[1], unit_rows(2, 32))


def test_fits_are_the_same_and_so_are_scores_and_effects(pair, tokenizer, texts):
    maps = [CausalMap.from_model(model, tokenizer, texts, **AT) for model in pair]
    one, other = (fit_exponential(cmap, num_factors=4, input_scale=3.0, iterations=2, progress=False) for cmap in maps)
    assert_near(other.V, one.V, 1e-4)
    options = {"vectors": one.steering_vectors(), "layer": 1}
    scores = [score_vectors(model, tokenizer, texts, **options, progress=False) for model in pair]
    assert_near(scores[1], scores[0], 1e-5)
    found = [effects(model, tokenizer, texts, **options, progress=False).divergence for model in pair]
    assert_near(found[1], found[0], 1e-4)


def test_it_is_steered_alike(pair, tokenizer, texts):
    completions = []
    for model in pair:
        with steer(model, layer=1, vector=20 * unit_rows(32, dtype=torch.float32)):
            completions.append(generate_completions(model, tokenizer, texts, max_new_tokens=4, progress=False))
    assert completions[0] == completions[1]
    assert completions[0] != generate_completions(pair[0], tokenizer, texts, max_new_tokens=4, progress=False)


def test_digests_do_not_depend_on_where_weights_lie_but_on_the_weights(pair):
    memory, disk = pair
    assert model_digest(disk) == model_digest(memory)
    other = tiny_model("Llama", dtype=torch.float32)
    other.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
    assert model_digest(other) != model_digest(memory)


def test_spread_by_itself_it_is_loaded_whole(tmp_path, tokenizer):
    tiny_model("Llama", dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    spread, _ = load_model(tmp_path, dtype="float32", device="auto")
    assert not spread.training
    assert not any(parameter.requires_grad for parameter in spread.parameters())
    assert model_digest(spread) == model_digest(load_model(tmp_path, dtype="float32")[0])
