import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from torch import nn

from dctlib.models import fingerprint
from dctlib.models.assets import ASSETS
from dctlib.models.fingerprint import chat_model_digest, fingerprint_model, load_fingerprinted, model_digest, model_key
from dctlib.paper.organisms.training import save_organism


def test_a_pinned_model_stays_open_and_one_trained_again_is_not_taken_for_it(tokenizer, tmp_path):
    save_organism(tiny_model("Llama", dtype=torch.float32), tokenizer, tmp_path / "model")
    pinned = fingerprint_model(str(tmp_path / "model"), "float32")
    model, _ = load_fingerprinted(**pinned)
    assert load_fingerprinted(**pinned)[0] is model
    changed = tiny_model("Llama", dtype=torch.float32)
    changed.get_input_embeddings().weight.data += 1
    save_organism(changed, tokenizer, tmp_path / "model")
    again = fingerprint_model(str(tmp_path / "model"), "float32")
    assert again["digest"] != pinned["digest"]
    load_fingerprinted.cache_clear()
    with pytest.raises(ValueError, match="was it trained again"):
        load_fingerprinted(**pinned)
    assert load_fingerprinted(**again)[0] is not model


def test_the_chat_template_is_part_of_the_digest_and_the_last_padding_is_not(tokenizer, llama):
    other_tokenizer = copy.deepcopy(tokenizer)
    before = chat_model_digest(llama, other_tokenizer)
    other_tokenizer(["w0", "w1 w2"], padding=True, truncation=True, max_length=4)
    assert chat_model_digest(llama, other_tokenizer) == before
    other_tokenizer.chat_template = "{{ messages[0].content }}"
    assert chat_model_digest(llama, other_tokenizer) != before


def test_the_tokens_that_end_an_answer_are_part_of_the_digest(tokenizer, llama):
    before = chat_model_digest(llama, tokenizer)
    llama.generation_config.eos_token_id = [2, 7]
    assert chat_model_digest(llama, tokenizer) != before


@pytest.fixture
def nothing_loads(monkeypatch):
    def load_model(name, **_options):
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr(fingerprint, "load_model", load_model)


@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"])
def test_a_pinned_model_is_identified_by_its_file_with_nothing_loaded(nothing_loads, name):
    pinned = {"model": name, "sha256": ASSETS[name].sha256, "conversion": 1}
    assert model_key(name, "bfloat16") == {**pinned, "dtype": "bfloat16"}
    assert model_key(name, "float32") == {**pinned, "dtype": "float32"}
    assert fingerprint_model(name, "bfloat16")["digest"] == f"{ASSETS[name].sha256}-1"


def test_a_key_names_the_dtype_that_was_measured_in(nothing_loads):
    with pytest.raises(ValueError, match="a record names what it was measured in"):
        model_key("smollm2-135m-instruct", "native")


def test_another_model_is_identified_by_its_digest(tokenizer, tmp_path):
    save_organism(tiny_model("Llama", dtype=torch.float32), tokenizer, tmp_path / "model")
    key = model_key(str(tmp_path / "model"), "float32")
    assert key == fingerprint_model(str(tmp_path / "model"), "float32")
    assert len(key["digest"]) == 64


def test_a_pinned_model_of_another_conversion_is_not_taken_for_it(monkeypatch, tokenizer, llama):
    monkeypatch.setattr(fingerprint, "load_model", lambda _name, **_options: (llama, tokenizer))
    settings = fingerprint_model("smollm2-135m-instruct", "float32")
    load_fingerprinted.cache_clear()
    assert load_fingerprinted(**settings)[0] is llama
    monkeypatch.setattr(fingerprint, "CONVERSION", 2)
    load_fingerprinted.cache_clear()
    with pytest.raises(ValueError, match="has digest"):
        load_fingerprinted(**settings)
    load_fingerprinted.cache_clear()


def test_model_digest_sees_the_configuration_and_not_where_it_came_from(llama):
    before = model_digest(llama)
    llama.config._name_or_path = "elsewhere"
    llama.config.transformers_version = "0"
    assert model_digest(llama) == before
    llama.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    assert model_digest(llama) != before


def test_model_digest_sees_one_changed_weight_and_not_how_it_lies_in_memory(llama):
    before = model_digest(llama)
    assert model_digest(llama) == before
    weight = llama.model.layers[3].mlp.down_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    assert model_digest(llama) == before
    with torch.no_grad():
        weight[0, 0] += 1e-9
    assert model_digest(llama) != before


def test_model_digest_sees_buffers_and_types(llama):
    before = model_digest(llama)
    llama.model.rotary_emb.inv_freq *= 2
    changed = model_digest(llama)
    assert changed != before
    llama.register_buffer("offset", torch.zeros(()), persistent=False)
    assert model_digest(llama) != changed
    assert model_digest(tiny_model("Llama").half()) != before


KINDS = [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64, torch.bfloat16]


@pytest.mark.parametrize("dtype", KINDS)
def test_model_digest_sees_every_byte_of_every_type(dtype):
    module = nn.Module()
    module.register_buffer("part", torch.zeros(3, 2).to(dtype))
    module.register_buffer("none", torch.zeros(0, 2).to(dtype))
    before = model_digest(module)
    module.get_buffer("part").view(torch.uint8)[2, -1] = 1
    assert model_digest(module) != before


def test_wrappers_leave_the_digest_as_it_is(llama):
    before = model_digest(llama)
    assert model_digest(nn.DataParallel(llama)) == before
    assert model_digest(torch.compile(llama)) == before  # pyright: ignore[reportArgumentType]


def test_model_digest_sees_which_adapter_is_active_and_how_strongly():
    lora = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model = get_peft_model(tiny_model("Llama", dtype=torch.float32), lora)
    model.add_adapter("other", lora)
    before = model_digest(model)
    assert model_digest(model.get_base_model()) == before
    with model.disable_adapter():
        assert model_digest(model) != before
    model.set_adapter("other")
    assert model_digest(model) != before
    model.set_adapter("default")
    assert model_digest(model) == before
    scaling = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").scaling
    scaling["default"] *= 2  # pyright: ignore[reportIndexIssue, reportArgumentType]
    assert model_digest(model) != before
    scaling["default"] /= 2  # pyright: ignore[reportIndexIssue, reportArgumentType]
    model.merge_adapter()
    assert model_digest(model) != before


def test_model_digest_sees_the_scales_of_quantised_weights():
    def quantised(factor):
        plain = tiny_model("Llama", dtype=torch.float32)
        plain.lm_head.weight.data *= factor
        return torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)

    assert model_digest(quantised(1)) == model_digest(quantised(1))
    assert model_digest(quantised(1)) != model_digest(quantised(2))


def test_model_digest_sees_the_parts_of_a_tensor_of_torchao():
    quantization = pytest.importorskip("torchao.quantization")

    def quantised(factor):
        linear = nn.Linear(32, 32, bias=False)
        linear.weight.data = factor * torch.eye(32)
        quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
        return linear

    assert model_digest(quantised(1)) == model_digest(quantised(1))
    assert model_digest(quantised(1)) != model_digest(quantised(2))


def test_a_digest_leaves_weights_that_bitsandbytes_packed_as_they_are():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
    linear.weight.data = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    linear = linear.to("cpu").eval()
    rows = torch.ones(2, 64)
    with torch.no_grad():
        before = linear(rows)
        digest = model_digest(linear)
        assert torch.equal(linear(rows), before)
        assert model_digest(linear) == digest
