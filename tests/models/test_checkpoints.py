import json
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BertConfig, LlamaConfig, T5Config, ViTConfig

from dctlib import CausalMap, load_model
from dctlib.models.blocks import get_blocks

TOKENS = torch.tensor([[6, 7, 8, 9]])
TEXTS = ["w0 w1 w2 w3", "w0 w1 w4"]
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def saved(folder, model, *, config=None, weights=None):
    """Save a model and a tokenizer, then change entries of its configuration and its weights."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if config:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | config))
    if weights:
        save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def llama(head="CausalLM", **settings):
    torch.manual_seed(0)
    model = getattr(transformers, f"LlamaFor{head}" if head else "LlamaModel")
    return model(LlamaConfig(**{**SIZES, "initializer_range": 0.3, **settings}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_a_model_with_another_head_is_refused(tmp_path, head, tied):
    saved(tmp_path, llama(head, tie_word_embeddings=tied))
    with pytest.raises(ValueError, match=f"saved as LlamaFor{head}, whose head gives no tokens"):
        load_model(tmp_path)


def test_a_model_without_a_head_is_whole_only_if_its_embedding_is_its_head(tmp_path):
    saved(tmp_path / "tied", llama("", tie_word_embeddings=True))
    load_model(tmp_path / "tied", device="cpu")
    saved(tmp_path / "untied", llama(""))
    with pytest.raises(ValueError, match=r"1 missing \(lm_head\.weight\)"):
        load_model(tmp_path / "untied")


ENCODERS = {
    "bert": lambda: transformers.BertForMaskedLM(BertConfig(**SIZES)),
    "bert as a language model": lambda: transformers.BertLMHeadModel(BertConfig(**SIZES)),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**SIZES)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_refused(tmp_path, name):
    saved(tmp_path, ENCODERS[name]())
    with pytest.raises(ValueError, match="is an encoder: its tokens see those behind them"):
        load_model(tmp_path)


def test_other_kinds_of_models_are_refused(tmp_path):
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    saved(tmp_path / "t5", transformers.T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)))
    with pytest.raises(ValueError, match=r"\(t5\) has an encoder and a decoder"):
        load_model(tmp_path / "t5")
    small: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    saved(tmp_path / "vit", transformers.ViTModel(ViTConfig(**small, image_size=8, patch_size=4)))
    with pytest.raises(ValueError, match=r"\(vit\) generates no text"):
        load_model(tmp_path / "vit")


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({}, lambda w: {k: v for k, v in w.items() if "1.mlp.up" not in k}, r"1 missing \(model.layers.1.mlp.up_proj"),
        ({"num_hidden_layers": 3}, None, r"9 missing \(model\.layers\.2"),
        ({"num_hidden_layers": 1}, None, r"9 without a place in the configuration \(model\.layers\.1"),
        ({"vocab_size": 70}, None, r"2 of another shape \(lm_head\.weight, model\.embed_tokens\.weight\)"),
        ({}, lambda w: {**w, "model.norm.bias": torch.ones(32)}, r"1 without a place .*\(model\.norm\.bias"),
    ],
    ids=["missing", "more layers", "fewer layers", "shape", "bias"],
)
def test_weights_that_are_not_all_loaded_are_refused(tmp_path, config, weights, message):
    saved(tmp_path, llama(), config=config, weights=weights)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, device="cpu")


def test_weights_of_a_part_that_the_model_lacks_are_left_out(tmp_path):
    saved(tmp_path, llama(), weights=lambda w: {**w, "visual.patch.weight": torch.ones(2)})
    assert torch.equal(load_model(tmp_path, device="cpu")[0](TOKENS).logits, llama()(TOKENS).logits)


def test_an_architecture_that_transformers_lacks_is_refused_in_one_line(tmp_path):
    saved(tmp_path, llama(), config={"model_type": "newer42"})
    with pytest.raises(ValueError, match=r"transformers has no architecture for .*newer42") as refused:
        load_model(tmp_path)
    assert "\n" not in str(refused.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_model(tmp_path)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    saved(tmp_path, llama())
    (tmp_path / "model.safetensors").unlink()
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    load_model(tmp_path, device="cpu")
    next(tmp_path.glob("model-00002-of-*")).unlink()
    with pytest.raises(ValueError, match=r"cannot load the weights of .*model-00002-of"):
        load_model(tmp_path, device="cpu")


def vision_model(family):
    torch.manual_seed(0)
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4}
    if family == "qwen2_vl":
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4}
    if family == "llava":
        text["model_type"] = "llama"
        vision |= {"model_type": "clip_vision_model", "projection_dim": 16}
    kind: Any = transformers.CONFIG_MAPPING[family]
    config = kind(text_config=text, vision_config=vision, image_token_id=60)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_vl", "idefics3"])
def test_the_text_of_a_vision_language_model_is_mapped_and_generated(tmp_path, family):
    model = vision_model(family)
    loaded: Any
    loaded, tokenizer = load_model(saved(tmp_path, model), device="cpu")
    assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    assert len(get_blocks(loaded)) == 2
    cmap = CausalMap.from_model(loaded, tokenizer, TEXTS, source=0, target=2)
    assert cmap.vjp(torch.ones(1, 32), torch.ones(1, 32)).norm() > 0
    options = {"input_ids": TOKENS, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(loaded.generate(**options), model.generate(**options))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "pip install optimum"),
        ({"quant_method": "awq", "bits": 4}, "pip install gptqmodel"),
        ({"quant_method": "exl2"}, "is quantised by exl2, which transformers does not read"),
        ({"bits": 4}, "is quantised by unnamed means"),
    ],
)
def test_weights_whose_package_is_missing_are_refused_with_its_name(tmp_path, settings, message):
    saved(tmp_path, llama(), config={"quantization_config": settings})
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.bfloat16), ("float32", torch.float32)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in eight bits")
def test_weights_in_float8_are_dequantised_on_a_cpu(tmp_path, dtype, expected):
    model = llama().bfloat16()

    def quantised(weights):
        for name in [name for name in weights if "proj" in name]:
            weights[f"{name}_scale_inv"] = torch.full((1, 1), weights[name].abs().max().item() / 448)
            weights[name] = (weights[name] / weights[f"{name}_scale_inv"]).to(torch.float8_e4m3fn)
        return weights

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    saved(tmp_path, model, config={"quantization_config": settings}, weights=quantised)
    loaded, _ = load_model(tmp_path, device="cpu", dtype=dtype)
    assert loaded.dtype == expected
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    own = model.state_dict()["model.layers.0.mlp.up_proj.weight"].float()
    found = loaded.state_dict()["model.layers.0.mlp.up_proj.weight"].float()
    assert 0 < (found - own).norm() < 0.05 * own.norm()


def test_weights_that_torchao_quantised_are_loaded_as_they_are(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    settings = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    plain = saved(tmp_path / "plain", llama())
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=torch.float32)
    loaded, tokenizer = load_model(saved(tmp_path / "int8", model), device="cpu")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert not torch.equal(loaded(TOKENS).logits, llama()(TOKENS).logits)
    assert CausalMap.from_model(loaded, tokenizer, TEXTS, source=0, target=2)(torch.ones(1, 32)).isfinite().all()


def test_weights_that_bitsandbytes_quantised_give_the_same_with_and_without_gradients(tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    plain = saved(tmp_path / "plain", llama(hidden_size=64, intermediate_size=128))
    options = {"quantization_config": settings, "dtype": torch.float32, "device_map": "cpu"}
    saved(tmp_path / "4bit", AutoModelForCausalLM.from_pretrained(plain, **options))
    loaded, _ = load_model(tmp_path / "4bit", device="cpu")
    embedded = loaded.get_input_embeddings()(TOKENS)
    without = loaded(inputs_embeds=embedded).logits
    torch.testing.assert_close(loaded(inputs_embeds=embedded.requires_grad_()).logits.detach(), without)
