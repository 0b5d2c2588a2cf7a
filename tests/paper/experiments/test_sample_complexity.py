import json
from typing import Any

import pytest
import torch
from tiny import tiny_model

from dctlib.evaluation.instructions import Split
from dctlib.models.loading import dtype_name
from dctlib.paper.experiments import real_models, sample_complexity
from dctlib.paper.experiments.sample_complexity import best_vector, sample_complexity_cells

REQUESTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(30)]
SETTING: dict[str, Any] = {
    "model": {"model": "tiny", "sha256": "0", "conversion": 1, "dtype": "float32"},
    "slice_ends": {"source": 1, "target": 3},
    "nonlinearity": 0.3,
    "num_factors": 4,
    "iterations": 2,
    "prompts": {"fit": 2, "pool": 10, "validation": 6, "test": 5, "judged": 4},
    "answer_tokens": 3,
    "shown_characters": 8,
    "seed": 0,
    "negative": "w9",
}


@pytest.fixture
def llama(monkeypatch, tokenizer):
    model = tiny_model("Llama", dtype=torch.float32)
    split = Split(REQUESTS[20:], REQUESTS[:4], REQUESTS[4:10], REQUESTS[10:20])
    monkeypatch.setattr(sample_complexity, "open_model", lambda name, dtype: (model, tokenizer))
    monkeypatch.setattr(sample_complexity, "harmful_instructions", lambda: split)
    monkeypatch.setattr(sample_complexity, "score_each", _score_words(sample_complexity.score_each))
    for remembered in (sample_complexity.scale_and_refusal_token, sample_complexity.draw_instructions):
        remembered.cache_clear()
    yield model
    for remembered in (sample_complexity.scale_and_refusal_token, sample_complexity.draw_instructions):
        remembered.cache_clear()


def _score_words(score_each):
    return lambda *args, **options: score_each(*args, positive="w8", **options)


@pytest.mark.parametrize(
    ("arm", "n"),
    [
        ("exponential", 2),
        ("exponential_axes", 1),
        ("quadratic", 1),
        ("linear", 1),
        ("linear_projected", 2),
        ("random", 0),
    ],
)
def test_every_arm_ranks_as_many_vectors_and_tests_one_of_the_best(llama, arm, n):
    found = best_vector(**SETTING, arm=arm, n=n, shuffle=0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(found["ranking"]) == 4 and found["best"] in range(4)
    assert len(found["scores"]) == 5 and len(found["verdicts"]) == 4
    assert found["refusal_token"] == "w9"
    assert best_vector(**SETTING, arm=arm, n=n, shuffle=0)["scores"] == found["scores"]


def test_shuffles_draw_other_instructions_and_no_vector_is_the_model_as_it_is(llama):
    draw = sample_complexity.draw_instructions
    orders = [draw("tiny", "float32", 3, 10, shuffle, False) for shuffle in (0, 1)]
    assert orders[0] != orders[1] and all(len(set(order)) == 3 for order in orders)
    assert draw("tiny", "float32", 2, 10, 0, False) == orders[0][:2], "fewer instructions are the first of more"
    assert len(best_vector(**SETTING, arm="unsteered", n=0, shuffle=0)["ranking"]) == 1


def test_only_instructions_that_are_refused_are_drawn(llama, monkeypatch):
    texts = iter(range(100))
    monkeypatch.setattr(real_models, "is_refusal", lambda completion: next(texts) % 2 == 0)
    drawn = sample_complexity.draw_instructions("tiny", "float32", 3, 10, 5, True)
    order = sample_complexity.draw_instructions("tiny", "float32", 10, 10, 5, False)
    assert drawn == (order[0], order[2], order[4])
    monkeypatch.setattr(real_models, "is_refusal", lambda completion: False)
    with pytest.raises(ValueError, match="refuses 0 of 10 instructions, expected at least 3"):
        sample_complexity.draw_instructions("tiny", "float32", 3, 10, 6, True)


def test_cells_need_no_model_and_their_keys_do_not_depend_on_how_many_shuffles_there_are():
    names = ("fit_prompts", "pool", "validation", "test", "judged")
    rest: dict[str, Any] = dict.fromkeys(names, 4) | {"source": 9, "target": 18, "negative": None, "seed": 0}
    few, more = (
        sample_complexity_cells(
            "qwen2.5-coder-1.5b-instruct",
            dtype="bfloat16",
            arms={"exponential": {"1": k, "4": k}, "linear": {"1": 2}},
            **rest,
        )
        for k in (2, 3)
    )
    assert len(few) == 1 + 2 * 4 and more[: len(few)] == few and len(more) == len(few) + 3
    assert all("negative" not in setting for _, setting in few)


def test_a_cell_names_the_type_that_native_is_on_this_machine():
    rest: dict[str, Any] = dict.fromkeys(("fit_prompts", "pool", "validation", "test", "judged"), 4)
    rest |= {"source": 9, "target": 18, "negative": None, "arms": {"linear": {"1": 2}}}
    cells = sample_complexity_cells("qwen2.5-coder-1.5b-instruct", dtype="native", **rest)
    named = dtype_name("native")
    assert {setting["model"]["dtype"] for _, setting in cells} == {named} <= {"bfloat16", "float32"}
