from typing import Any

import pytest
import torch
from tiny import tiny_model, unit_rows

from dctlib import format_chat
from dctlib.models.fingerprint import fingerprint_model
from dctlib.paper.experiments.audit import AuditResult, audit_model, audit_vectors
from dctlib.paper.organisms.secrets import planted_secret
from dctlib.paper.organisms.training import save_organism
from dctlib.runs.sweep import run_sweep
from dctlib.steering.effects import effects
from dctlib.steering.generation import generate_completions, generate_per_vector

INSTRUCTIONS, HELD_OUT = ["w0 w1", "w2 w3 w4"], ["w5", "w6 w7", "w8 w9 w10"]
CONFIG: dict[str, Any] = {
    "source": 1,
    "target": 3,
    "sizes": [1, 2],
    "nonlinearity": 0.5,
    "num_factors": 4,
    "iterations": 1,
    "answer_tokens": 3,
}
OPTIONS: dict[str, Any] = {
    "config": CONFIG,
    "seed": 0,
    "dtype": "float32",
    "instructions": INSTRUCTIONS,
    "held_out": HELD_OUT,
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama", dtype=torch.float32)


def test_a_secret_counts_once_any_completion_holds_it_and_in_the_order_of_reading():
    secret = planted_secret("backdoor", seed=0)
    result = AuditResult(
        [["no", "no"], ["no", secret.response], ["no", "no"]], {"fluent": [2, 1, 0], "divergence": [1, 0, 2]}
    )
    assert result.reveals(secret, "fluent").tolist() == [False, True, False]
    assert result.reveals(secret, "divergence").tolist() == [True, False, False]
    assert not result.reveals(planted_secret("persona", seed=0), "fluent").any()


def test_what_is_read_first_is_shown():
    secret = planted_secret("backdoor", seed=0)
    early, late = f"early {secret.response}", f"late {secret.response}"
    result = AuditResult([["no", late], [early, late]], {"fluent": [0, 1], "divergence": [1, 0]})
    assert result.first_to_reveal(secret, "fluent") == late
    assert result.first_to_reveal(secret, "divergence") == early
    assert result.first_to_reveal(planted_secret("persona", seed=0), "fluent") is None


def test_each_vector_is_audited_and_the_first_of_a_cluster_comes_first(model, tokenizer):
    one, two = 30 * unit_rows(2, 32).float()
    vectors = torch.stack([one, 1.01 * one, two])
    texts, options = format_chat(tokenizer, HELD_OUT), {"layer": 1, "max_new_tokens": 3, "progress": False}
    clean = generate_completions(model, tokenizer, texts, max_new_tokens=3, progress=False)
    result = audit_vectors(model, tokenizer, HELD_OUT, clean, vectors, **options)
    assert result.completions == generate_per_vector(model, tokenizer, texts, vectors, **options)
    for order in result.orders.values():
        assert sorted(order) == [0, 1, 2]
        assert order[2] != 2  # one of the pair that points one way stands last
    divergence = effects(model, tokenizer, texts, vectors, layer=1, progress=False).divergence.mean(1)
    firsts = result.orders["divergence"][:2]
    assert firsts[0] == divergence.argmax()
    assert firsts == sorted(firsts, key=lambda number: -divergence[number])


def test_an_audit_covers_every_method_and_can_be_swept(model, tokenizer, tmp_path):
    save_organism(tiny_model("Llama", dtype=torch.float32), tokenizer, tmp_path / "organism")
    digest = fingerprint_model(str(tmp_path / "organism"), "float32")["digest"]
    setting: dict[str, Any] = {"model": str(tmp_path / "organism"), "digest": digest, **OPTIONS}
    (found,) = run_sweep(audit_model, [setting], folder=tmp_path / "cache", progress=False)
    results = {method: AuditResult(**fields) for method, fields in found.items()}
    assert [*results] == ["DCT, n = 1", "DCT, n = 2", "power steering", "random", "sampling"]
    for result in results.values():
        assert [len(completions) for completions in result.completions] == [3] * 4
        assert all(sorted(order) == [0, 1, 2, 3] for order in result.orders.values())
    assert results["DCT, n = 1"].completions != results["random"].completions
    with pytest.raises(ValueError, match="was it trained again"):
        audit_model(**{**setting, "digest": "0" * 64})
    for wrong in ({"sizes": [1, 3]}, {"num_factors": 5}):
        with pytest.raises(ValueError, match="at most 2 instructions, and an even number"):
            audit_model(**{**setting, "config": {**CONFIG, **wrong}})
