import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny import BLOCKS, tiny_model, unit_rows
from transformers import AutoModelForCausalLM

from dctlib import steer
from dctlib.exchange.steered_model import steered_copy

TOKENS = torch.arange(20, 32)[None]
VECTOR = 3 * unit_rows(32)
NO_WINDOW = {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * BLOCKS}
SHAPE = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "vocab_size": 64}


def random_model(family, **options):
    """A family that `tiny` lacks, with every weight drawn, biases and norms too."""
    config = getattr(transformers, f"{family}Config")(
        **SHAPE, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=64, **options
    )
    model = AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weight.copy_(centre + noise * (0.3 if weight.ndim > 1 else 0.1))
    return model


def without_window(family):
    model = tiny_model(family)
    for name, value in NO_WINDOW.items():
        if hasattr(model.config, name):
            setattr(model.config, name, value)
    return type(model)(model.config).double().eval().requires_grad_(False)


MODELS = {
    "Llama": lambda: tiny_model("Llama"),  # an option makes the bias
    "Qwen2": lambda: without_window("Qwen2"),  # no option does, but it is a Llama model
    "Mistral": lambda: without_window("Mistral"),
    "GPT2": lambda: tiny_model("GPT2"),  # it has the bias, and learned positions
    "GPTNeoX": lambda: tiny_model("GPTNeoX"),  # attention and MLP write side by side
    "Granite": lambda: random_model("Granite", intermediate_size=48, residual_multiplier=0.3, embedding_multiplier=4.0),
    "Falcon": lambda: random_model("Falcon", new_decoder_architecture=False, multi_query=False),
    "Bloom": lambda: random_model("Bloom"),  # a norm stands behind the embedding
    "Cohere": lambda: random_model("Cohere", intermediate_size=48, num_key_value_heads=2),
}


def reloaded(model, folder):
    model.save_pretrained(folder)
    load: Any = AutoModelForCausalLM.from_pretrained
    found, loading = load(folder, dtype=model.dtype, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    return found.eval()


@pytest.mark.parametrize("layer", [0, 2, BLOCKS])
@pytest.mark.parametrize("family", MODELS)
def test_plain_transformers_runs_the_saved_copy_as_we_steer(family, layer, tmp_path):
    model = MODELS[family]()
    before = copy.deepcopy(model.state_dict())
    unsteered = model(TOKENS).logits
    with steer(model, layer=layer, vector=VECTOR):
        expected = model(TOKENS).logits
        said = model.generate(TOKENS, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = reloaded(steered_copy(model, layer=layer, vector=VECTOR), tmp_path)
    torch.testing.assert_close(found(TOKENS).logits, expected, rtol=1e-6, atol=1e-6)
    assert found.generate(TOKENS, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0).equal(said)
    assert (expected - unsteered).abs().max() > 1e-2
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model(TOKENS).logits, unsteered)


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3", "Qwen3", "Phi3", "Olmo2"])
def test_where_no_bias_fits_only_the_embedding_takes_a_vector(family):
    """Gemma scales its embeddings; a norm without a bias stands behind the MLPs of Gemma and OLMo 2."""
    model = tiny_model(family)
    with steer(model, layer=0, vector=VECTOR):
        expected = model(TOKENS).logits
    torch.testing.assert_close(steered_copy(model, layer=0, vector=VECTOR)(TOKENS).logits, expected)
    for layer in (1, BLOCKS):
        with pytest.raises(ValueError, match=f"no bias of {family}ForCausalLM adds a vector to the input of block"):
            steered_copy(model, layer=layer, vector=VECTOR)


def test_tied_embeddings_are_untied(tmp_path):
    config = tiny_model("Llama").config
    config.tie_word_embeddings = True
    model = transformers.LlamaForCausalLM(config).double().eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with steer(model, layer=0, vector=VECTOR):
        expected = model(TOKENS).logits
    found = reloaded(steered_copy(model, layer=0, vector=VECTOR), tmp_path)
    torch.testing.assert_close(found(TOKENS).logits, expected)
    torch.testing.assert_close(found.lm_head.weight, model.lm_head.weight)
    assert reloaded(steered_copy(model, layer=1, vector=VECTOR), tmp_path).config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [0, 2, BLOCKS])
def test_half_precision_rounds_as_steering_does(layer, dtype):
    model = without_window("Qwen2").to(dtype)
    found = steered_copy(model, layer=layer, vector=VECTOR)
    assert {weight.dtype for weight in found.parameters()} == {dtype}
    exact = copy.deepcopy(model).double()
    with steer(model, layer=layer, vector=VECTOR), steer(exact, layer=layer, vector=VECTOR.to(dtype)):
        expected, rounded = exact(TOKENS).logits, model(TOKENS).logits
    error = (found(TOKENS).logits - expected).abs().max()
    assert error <= 2 * (rounded - expected).abs().max() <= 0.2


def test_copies_of_copies_add_up(llama):
    one, two = 2 * unit_rows(2, 32)
    both = steered_copy(steered_copy(llama, layer=1, vector=one), layer=3, vector=two.numpy())  # pyright: ignore[reportArgumentType]
    with steer(llama, layer=1, vector=one), steer(llama, layer=3, vector=two):
        torch.testing.assert_close(both(TOKENS).logits, llama(TOKENS).logits)


def test_a_vision_language_model_takes_a_vector_behind_its_images(tmp_path):
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.LlavaConfig(text_config=tiny_model("Llama").config, vision_config=vision)
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    with steer(model, layer=2, vector=VECTOR):
        expected = model(TOKENS).logits
    steered_copy(model, layer=2, vector=VECTOR).save_pretrained(tmp_path)
    found = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(found(TOKENS).logits, expected)
    assert (model(TOKENS).logits - expected).abs().max() > 0.1
    with pytest.raises(ValueError, match="images do not pass the embedding"):
        steered_copy(model, layer=0, vector=VECTOR)


def test_a_compiled_model_is_copied_plain(llama):
    with steer(llama, layer=2, vector=VECTOR):
        expected = llama(TOKENS).logits
    compiled: Any = torch.compile(llama, backend="eager")
    compiled(TOKENS)
    found = steered_copy(compiled, layer=2, vector=VECTOR)
    assert type(found) is type(llama)
    torch.testing.assert_close(found(TOKENS).logits, expected)
    llama.model.layers[1] = torch.compile(llama.model.layers[1], backend="eager")
    with pytest.raises(ValueError, match="compile blocks afterwards"):
        steered_copy(llama, layer=2, vector=VECTOR)


def test_the_mode_of_training_stays(llama):
    assert steered_copy(llama.train(), layer=1, vector=VECTOR).training and llama.training


@pytest.mark.parametrize("family", ["Qwen2", "Mistral"])
def test_what_is_a_llama_model_in_all_but_name_becomes_one(family):
    """The real models of the study are Qwen2, whose own config has no bias to offer."""
    model = without_window(family)
    assert type(steered_copy(model, layer=0, vector=VECTOR)) is type(model)
    found = steered_copy(model, layer=2, vector=VECTOR)
    assert found.config.model_type == "llama" and found.config.mlp_bias
    assert found.generation_config.to_dict() == model.generation_config.to_dict()
    torch.testing.assert_close(found.state_dict()["model.layers.1.mlp.down_proj.bias"], VECTOR)
    added = found.state_dict().keys() - model.state_dict().keys() - {"model.layers.1.mlp.down_proj.bias"}
    assert added and not any(found.state_dict()[name].any() for name in added)


def test_a_sliding_window_is_no_llama():
    with pytest.raises(ValueError, match="no bias of Qwen2ForCausalLM"):
        steered_copy(tiny_model("Qwen2"), layer=2, vector=VECTOR)


@pytest.mark.parametrize(
    ("layer", "vector", "message"),
    [
        (5, VECTOR, "from 0 to 3"),
        (1, torch.ones(2, 32), r"\(2, 32\), expected \(d,\)"),
        (1, torch.ones(31), "31"),
        (1, torch.full((32,), np.nan), "not finite"),
    ],
)
def test_bad_options_are_named(llama, layer, vector, message):
    with pytest.raises(ValueError, match=message):
        steered_copy(llama, layer=layer, vector=vector)


def test_adapters_and_quantised_weights_are_refused(llama):
    adapted: Any = get_peft_model(tiny_model("Llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge an adapter first"):
        steered_copy(adapted, layer=1, vector=VECTOR)
    merged = adapted.merge_and_unload()
    with steer(merged, layer=1, vector=VECTOR):
        expected = merged(TOKENS).logits
    torch.testing.assert_close(steered_copy(merged, layer=1, vector=VECTOR)(TOKENS).logits, expected)
    llama.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(ValueError, match="quantised"):
        steered_copy(llama, layer=1, vector=VECTOR)
