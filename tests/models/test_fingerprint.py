import copy

import pytest
import torch
from tiny import tiny_model

from dctlib.models.fingerprint import chat_model_digest, fingerprint_model, load_fingerprinted
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


def test_how_a_model_is_spoken_to_is_part_of_it_and_what_it_was_last_told_is_not(tokenizer, llama):
    spoken = copy.deepcopy(tokenizer)
    before = chat_model_digest(llama, spoken)
    spoken(["w0", "w1 w2"], padding=True, truncation=True, max_length=4)
    assert chat_model_digest(llama, spoken) == before
    spoken.chat_template = "{{ messages[0].content }}"
    assert chat_model_digest(llama, spoken) != before
