from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dctlib import CausalMap, load_model
from dctlib.models.gguf import _check_tensors

TOKENS = torch.arange(60)[None] % 50 + 3
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def random_model(family, **settings):
    kind: Any = CONFIG_MAPPING[family]
    config = kind(**SIZES, initializer_range=0.3, pad_token_id=0, **settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "starcoder2"])
def test_a_file_gives_the_model_that_it_was_converted_from(tmp_path, family):
    own: dict[str, Any] = {
        "gemma2": {"head_dim": 8, "sliding_window": 8},
        "gpt2": {"n_inner": None},
        "qwen3": {"head_dim": 8},
        "starcoder2": {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}, "sliding_window": None},
    }
    changes: dict[str, Any] = {
        "gemma2": {"attention.key_length": 8, "attention.sliding_window": 8, "attn_logit_softcapping": 50.0},
        "qwen3": {"attention.key_length": 8},
    }
    model = random_model(family, **own.get(family, {}))
    write_gguf(tmp_path / "tiny.gguf", model, family, changes=changes.get(family))
    loaded, tokenizer = load_model(tmp_path / "tiny.gguf", device="cpu")
    assert type(loaded) is type(model)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert tokenizer.chat_template
    assert tokenizer.pad_token is not None
    cmap = CausalMap.from_model(loaded, tokenizer, ["ĀāĂ", "ĂĀāă"], source=1, target=2, positions=1)
    assert cmap(torch.ones(1, 32)).isfinite().all()


def test_a_file_becomes_a_plain_model_to_save_and_to_move(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama")
    model, tokenizer = load_model(str(tmp_path / "tiny.gguf"), device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.double().dtype == torch.float64
    model.float().save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved", device="cpu")[0](TOKENS).logits, model(TOKENS).logits)


def test_the_scaled_positions_of_llama_3_are_those_of_the_model(tmp_path):
    model, plain = (
        random_model("llama", rope_parameters=LLAMA3),
        random_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    )
    factors = (plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()
    write_gguf(tmp_path / "tiny.gguf", model, "llama", rope_freqs=factors)
    loaded, _ = load_model(tmp_path / "tiny.gguf", device="cpu")
    assert (model(TOKENS).logits - plain(TOKENS).logits).norm() > 1e-3 * model(TOKENS).logits.norm()
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    factors[-1] *= 1.1
    factors[1] *= 1.3
    write_gguf(tmp_path / "other.gguf", model, "llama", rope_freqs=factors)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight of .* are not those of Llama 3"):
        load_model(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
        {"attention.scale": 0.1},
        {"logit_scale": 0.5},
        {"attention.sliding_window": 8},
        {"final_logit_softcapping": 30.0},
    ],
)
def test_a_setting_that_is_not_read_is_refused(tmp_path, changes):
    write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", changes=changes)
    with pytest.raises(ValueError, match=rf"does not read llama\.{next(iter(changes))} = "):
        load_model(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("split", ["stablelm2", None])
def test_a_tokenizer_that_may_split_text_otherwise_is_refused(tmp_path, tokenizer, split):
    pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", split=split)
    with pytest.raises(ValueError, match=rf"splits text \(tokenizer\.ggml\.pre is {split}\); pass tokenizer="):
        load_model(tmp_path / "tiny.gguf", device="cpu")
    tokenizer.save_pretrained(tmp_path / "words")
    assert len(load_model(tmp_path / "tiny.gguf", device="cpu", tokenizer=str(tmp_path / "words"))[1]) == len(tokenizer)
    write_gguf(tmp_path / "qwen.gguf", random_model("llama"), "llama", split="qwen2")
    load_model(tmp_path / "qwen.gguf", device="cpu")


def test_weights_that_are_offloaded_count_each(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama")
    model: Any = load_model(tmp_path / "tiny.gguf", device="cpu")[0]
    _check_tensors(tmp_path / "tiny.gguf", model.to("meta"))


def test_neutral_settings_are_taken(tmp_path):
    neutral = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "attention.key_length": 8}
    write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", changes=neutral)
    load_model(tmp_path / "tiny.gguf", device="cpu")


def test_a_tensor_that_is_not_read_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", blk__0__attn_q_norm=np.ones(8, dtype=np.float32))
    with pytest.raises(ValueError, match=r"transformers does not read all tensors; load the folder"):
        load_model(tmp_path / "tiny.gguf")


def test_experts_that_are_not_read_are_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", changes={"expert_used_count": 2})
    with pytest.raises(ValueError, match=r"does not read llama\.expert_used_count = 2"):
        load_model(tmp_path / "tiny.gguf")


def test_parts_other_architectures_and_damaged_files_are_refused(tmp_path):
    write_gguf(tmp_path / "part.gguf", random_model("llama"), "llama", changes={"split.count": 3})
    with pytest.raises(ValueError, match="one of 3 parts; merge them"):
        load_model(tmp_path / "part.gguf")
    write_gguf(tmp_path / "other.gguf", random_model("llama"), "minicpm")
    with pytest.raises(ValueError, match=r"does not read the architecture 'minicpm' .* it reads .*llama.*qwen2"):
        load_model(tmp_path / "other.gguf")
    write_gguf(tmp_path / "whole.gguf", random_model("llama"), "llama")
    content = (tmp_path / "whole.gguf").read_bytes()
    for size in (10, 2000, len(content) - 1000):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            load_model(tmp_path / "cut.gguf")
