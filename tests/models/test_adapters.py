import json
import sys

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tiny import assert_near, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dctlib import ablate, load_model
from dctlib.models.fingerprint import model_digest

TOKENS = torch.tensor([[6, 7, 8, 9, 10]])
LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


@pytest.fixture
def base(tmp_path):
    return saved_base(tmp_path / "base")


def saved_base(folder, *, family="Llama", tied=False):
    model = tiny_model(family, dtype=torch.float32)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def trained(base, folder, config, *, rows=None):
    """Save an adapter with random weights, and return the logits of model and adapter together."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows)
    adapted = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(folder)
        return adapted(input_ids=TOKENS).logits


ADAPTERS = {
    "lora": LoraConfig(target_modules="all-linear", **LORA),
    "dora": LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True, **LORA),
    "pissa": LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", **LORA),
    "whole norm": LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], **LORA),
    "embeddings": LoraConfig(target_modules=["embed_tokens", "lm_head"], **LORA),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[6, 7], **LORA),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(target_modules=["q_proj"], r=4),
    "oft": OFTConfig(target_modules=["q_proj"], oft_block_size=8),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_merged_into_a_plain_model(base, tmp_path, kind):
    expected = trained(base, tmp_path / "adapter", ADAPTERS[kind])
    model, _ = load_model(tmp_path / "adapter", device="cpu")
    assert_near(model(TOKENS).logits, expected, 1e-5)
    assert (model(TOKENS).logits - AutoModelForCausalLM.from_pretrained(base)(TOKENS).logits).norm() > 0.1
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not [name for name, _ in model.named_modules() if "lora" in name or "base_layer" in name]
    with ablate(model, torch.ones(32)):
        model(TOKENS)


TIED = {
    "head": LoraConfig(target_modules=["q_proj", "lm_head"], **LORA),
    "embedding": LoraConfig(target_modules=["embed_tokens"], **LORA),
    "whole embedding": LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], **LORA),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[6, 7], **LORA),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", TIED)
def test_a_tied_embedding_is_changed_where_the_adapter_changes_it(tmp_path, kind):
    expected = trained(saved_base(tmp_path / "base", tied=True), tmp_path / "adapter", TIED[kind])
    model, tokenizer = load_model(tmp_path / "adapter", device="cpu")
    assert_near(model(TOKENS).logits, expected, 1e-5)
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    assert torch.equal(load_model(tmp_path / "merged", device="cpu")[0](TOKENS).logits, model(TOKENS).logits)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_may_bring_a_larger_vocabulary_and_its_own_tokenizer(tmp_path, tied):
    config = LoraConfig(target_modules=["q_proj"], **LORA)
    expected = trained(saved_base(tmp_path / "base", tied=tied), tmp_path / "adapter", config, rows=70)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    model, loaded = load_model(tmp_path / "adapter", device="cpu")
    assert loaded("w0 new")["input_ids"] == [6, 64]
    assert_near(model(TOKENS).logits, expected, 1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_that_the_adapter_did_not_bring_are_not_made_up(base, tmp_path):
    trained(base, tmp_path / "adapter", LoraConfig(target_modules=["embed_tokens"], **LORA), rows=70)
    with pytest.raises(ValueError, match="with another vocabulary, and brings one of two embeddings alone"):
        load_model(tmp_path / "adapter", device="cpu")


UNMERGEABLE = {
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PREFIX_TUNING": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "ADAPTION_PROMPT": AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
}


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_an_adapter_that_changes_no_weights_is_refused(base, tmp_path, kind):
    trained(base, tmp_path / "adapter", UNMERGEABLE[kind])
    with pytest.raises(ValueError, match=f"of the type {kind}: it adds tokens and changes no weights"):
        load_model(tmp_path / "adapter")


def edited(folder, **changes):
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    trained(base, tmp_path / "adapter", LoraConfig(target_modules=["q_proj"], **LORA))
    edited(tmp_path / "adapter", base_model_name_or_path=str(saved_base(tmp_path / "other", family="GPT2")))
    with pytest.raises(ValueError, match="does not fit GPT2LMHeadModel"):
        load_model(tmp_path / "adapter", device="cpu")
    edited(tmp_path / "adapter", base_model_name_or_path=str(base), target_modules=["k_proj"])
    with pytest.raises(ValueError, match=r"missing \['base_model.*k_proj.*without a place \['base_model.*q_proj"):
        load_model(tmp_path / "adapter", device="cpu")


def test_files_of_an_adapter_that_are_missing_or_damaged_are_named(base, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    trained(base, folder, LoraConfig(target_modules=["q_proj"], **LORA))
    edited(folder, base_model_name_or_path="./nowhere")
    with pytest.raises(ValueError, match=r"no model folder or file \./nowhere"):
        load_model(folder)
    edited(folder, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="fill in its base_model_name_or_path"):
        load_model(folder)
    edited(folder, base_model_name_or_path=str(base), peft_type="NEWER")
    with pytest.raises(ValueError, match="type 'NEWER', which the installed peft lacks"):
        load_model(folder)
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="pip install peft"):
        patched.setitem(sys.modules, "peft", None)
        load_model(folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors, the only format read"):
        load_model(folder)
    (folder / "adapter_config.json").write_text("{")
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_config\.json of .* is damaged"):
        load_model(folder)


def test_an_adapter_beside_a_whole_model_is_refused_and_beside_a_configuration_is_not(base, tmp_path):
    expected = trained(base, tmp_path / "adapter", LoraConfig(target_modules=["q_proj"], **LORA))
    (tmp_path / "adapter" / "config.json").write_bytes((base / "config.json").read_bytes())
    assert_near(load_model(tmp_path / "adapter", device="cpu")[0](TOKENS).logits, expected, 1e-5)
    (tmp_path / "adapter" / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds a whole model and an adapter; move one of them"):
        load_model(tmp_path / "adapter")


def test_loading_draws_no_global_random_numbers_and_repeats(base, tmp_path):
    trained(base, tmp_path / "adapter", LoraConfig(target_modules=["q_proj"], **LORA))
    state = torch.get_rng_state()
    digests = {model_digest(load_model(tmp_path / "adapter", device="cpu")[0]) for _ in range(2)}
    assert len(digests) == 1
    assert torch.equal(torch.get_rng_state(), state)
