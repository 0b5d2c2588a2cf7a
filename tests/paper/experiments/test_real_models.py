import json

import pytest
import torch
from tiny import tiny_model

from dctlib.evaluation.instructions import Split
from dctlib.evaluation.judges import is_refusal
from dctlib.models.chat import format_chat
from dctlib.paper.experiments import real_models
from dctlib.paper.experiments.real_models import compare_with_random, openings, real_models_cells, refusals
from dctlib.runs.cache import declared_version
from dctlib.steering.generation import generate_completions

MODEL = {"model": "tiny", "sha256": "0", "conversion": 1, "dtype": "float32"}
REQUESTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(12)]
SETTING = {
    "source": 1,
    "target": 3,
    "nonlinearity": 0.3,
    "num_factors": 3,
    "iterations": 2,
    "prompts": {"fit": 2, "validation": 3, "test": 4},
    "answer_tokens": 3,
    "shown_characters": 8,
    "seed": 0,
}


@pytest.fixture
def llama(monkeypatch, tokenizer):
    """A tiny model of whose completions every one counts as a refusal."""
    model = tiny_model("Llama", dtype=torch.float32)
    monkeypatch.setattr(real_models, "open_model", lambda name, dtype: (model, tokenizer))
    monkeypatch.setattr(real_models, "fetch", lambda name: name)
    monkeypatch.setattr(real_models, "load_advbench", lambda path: [{"goal": request} for request in REQUESTS])
    split = Split([], REQUESTS[:3], REQUESTS[3:6], REQUESTS[6:])
    monkeypatch.setattr(real_models, "harmful_instructions", lambda: split)
    monkeypatch.setattr(real_models, "is_refusal", lambda completion: True)
    return model


def test_refusals_are_those_of_the_requests_in_their_order(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(real_models, "is_refusal", is_refusal)
    verdicts = refusals(MODEL, first=2, count=3, answer_tokens=3, shown_characters=4)
    prompts = format_chat(tokenizer, REQUESTS[2:5])
    completions = generate_completions(llama, tokenizer, prompts, max_new_tokens=3, progress=False)
    assert [verdict["refused"] for verdict in verdicts] == [is_refusal(completion) for completion in completions]
    assert [verdict["opening"] for verdict in verdicts] == [" ".join(text.split()[:4]) for text in completions]
    assert all(len(verdict["prefix"]) <= 4 + len(" …") for verdict in verdicts)


def test_a_comparison_judges_the_vector_with_the_highest_validation_score(llama):
    found = compare_with_random(MODEL, **SETTING)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {kind: len(scores) for kind, scores in found["scores"].items()} == {"DCT": 3, "random": 3}
    assert {name: len(verdicts) for name, verdicts in found["test"].items()} == {"unsteered": 4, "DCT": 4, "random": 4}
    assert found["input_scale"] > 0
    assert compare_with_random(MODEL, **SETTING) == found


def test_a_model_that_refuses_too_little_is_named(llama, monkeypatch):
    monkeypatch.setattr(real_models, "is_refusal", lambda completion: False)
    with pytest.raises(ValueError, match="refuses 0 of 3 requests, expected at least 2"):
        compare_with_random(MODEL, **SETTING)


def test_cells_cover_every_request_once_and_need_no_model():
    names = ["qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"]
    parameters = {"dtype": "bfloat16", "sources": [8, 9], "targets": [16, 18], "requests": 10, "requests_per_cell": 4}
    parameters |= {"refusal_tokens": 5, "fit_prompts": 1, "validation": 2, "test": 3, "shown_characters": 6, "seed": 0}
    cells = real_models_cells(names, **parameters)
    assert [task.__name__ for task, _ in cells] == ["compare_with_random"] * 2 + ["refusals"] * 6
    for name in names:
        parts = [of for task, of in cells if task is refusals and of["model"]["model"] == name]
        assert [request for part in parts for request in range(part["first"], part["first"] + part["count"])] == [
            *range(10)
        ]
    assert {declared_version(task) for task, _ in cells} == {2}


def test_openings_are_counted_over_refusals_alone():
    verdicts = [{"opening": "I'm sorry", "refused": True}] * 2 + [{"opening": "Sure", "refused": False}]
    assert openings(verdicts) == {"I'm sorry": 2}
