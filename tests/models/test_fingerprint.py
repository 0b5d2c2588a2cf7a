import copy

import pytest
import torch
from tiny import tiny_model

from dctlib.models import fingerprint
from dctlib.models.assets import ASSETS
from dctlib.models.fingerprint import chat_model_digest, fingerprint_model, load_fingerprinted, model_key
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
