import json
from functools import partial
from typing import Any

import pytest
import torch
from tiny import tiny_model

from dctlib.evaluation.instructions import Split
from dctlib.fits.baselines import random_vectors
from dctlib.paper.experiments import aggregates
from dctlib.paper.experiments import real_multiplicity as study
from dctlib.paper.experiments.real_multiplicity import (
    ablated_model,
    each_vector,
    real_multiplicity_cells,
    training_curve,
)
from dctlib.steering.generation import generate_completions
from dctlib.steering.hooks import ablate, steer

REQUESTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(40)]
OF_A_FIT: dict[str, Any] = {
    "model": {"model": "tiny", "sha256": "0", "conversion": 1, "dtype": "float32"},
    "slice_ends": {"source": 1, "target": 3},
    "fit": {
        "nonlinearity": 0.3,
        "num_factors": 4,
        "iterations": 2,
        "fit_prompts": 2,
        "calibration_prompts": 2,
        "pool": 8,
    },
    "seed": 0,
}
SETTING: dict[str, Any] = {
    **OF_A_FIT,
    "prompts": {"validation": 6, "answered": 4, "test": 5},
    "answer_tokens": 3,
    "shown_characters": 8,
}


@pytest.fixture
def llama(monkeypatch, tokenizer):
    model = tiny_model("Llama", dtype=torch.float32)
    harmful = Split(REQUESTS[30:], REQUESTS[:4], REQUESTS[4:12], REQUESTS[12:20])
    monkeypatch.setattr(study, "open_model", lambda name, dtype: (model, tokenizer))
    monkeypatch.setattr(study, "harmful_instructions", lambda: harmful)
    monkeypatch.setattr(study, "benign_split", lambda: Split(REQUESTS[20:30], [], [], []))
    monkeypatch.setattr(study, "scale_and_refusal_token", lambda *_: (3.0, "w9"))
    monkeypatch.setattr(study, "draw_instructions", lambda *_: tuple(REQUESTS[:2]))
    for module, name in ((study, "score_vectors"), (study, "score_texts"), (aggregates, "score_texts")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), positive="w8"))
    for remembered in (study._scored_fit, study._wide_fit):
        remembered.cache_clear()
    yield model
    for remembered in (study._scored_fit, study._wide_fit):
        remembered.cache_clear()


def completed(model, tokenizer, requests):
    chats = study.format_chat(tokenizer, requests)
    return [
        text[:8].strip() for text in generate_completions(model, tokenizer, chats, max_new_tokens=3, progress=False)
    ]


@pytest.mark.parametrize("kind", ["DCT", "random"])
def test_every_vector_completes_requests_and_one_of_each_kind_is_tested(llama, tokenizer, kind):
    found = each_vector(**SETTING, kind=kind)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(found["scores"]) == len(found["verdicts"]) == 4
    assert {len(each) for each in found["verdicts"]} == {4}
    assert found["qualifying"][0] == found["scores"].index(max(found["scores"]))
    assert {label: len(each["verdicts"]) for label, each in found["test"].items()} == dict.fromkeys(
        ("best", "mean", "singular"), 5
    )
    if kind == "random":
        vector = random_vectors(4, llama.config.hidden_size, norm=3.0, seed=0)[2]
        with steer(llama, vector=vector, layer=1):
            expected = completed(llama, tokenizer, REQUESTS[4:8])
        shown = [verdict["prefix"].removesuffix(" …") for verdict in found["verdicts"][2]]
        assert shown == expected


@pytest.mark.parametrize("side", ["none", "source", "target", "random", "difference of means"])
def test_each_direction_is_ablated_alone_and_the_best_one_answers(llama, tokenizer, side):
    found = ablated_model(**SETTING, side=side, most=2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    several = side in ("source", "target", "random")
    assert len(found["scores"]) == (2 if several else 1)
    assert len(found["aggregates"]) == (2 if several else 0)
    assert len(found["verdicts"]) == 5
    shown = [verdict["prefix"].removesuffix(" …") for verdict in found["verdicts"]]
    if side == "none":
        assert shown == completed(llama, tokenizer, REQUESTS[12:17])
    if side == "random":
        rows = random_vectors(2, llama.config.hidden_size, norm=1.0, seed=0)
        with ablate(llama, rows[found["scores"].index(max(found["scores"]))]):
            assert shown == completed(llama, tokenizer, REQUESTS[12:17])


def test_a_curve_has_one_point_an_iteration(llama):
    found = training_curve(**OF_A_FIT)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(found["objective"]) == 2 and found["objective"][-1] > found["objective"][0] > 0


@pytest.mark.parametrize(("task", "wrong"), [(each_vector, {"kind": "prayer"}), (ablated_model, {"side": "prayer"})])
def test_an_unknown_kind_is_named(llama, task, wrong):
    with pytest.raises(ValueError, match=r"='prayer', expected one of"):
        task(**SETTING, **wrong, **({"most": 2} if "side" in wrong else {}))


def test_cells_come_in_order_of_weight_and_need_no_model():
    sizes = dict.fromkeys(("validation", "answered", "test", "answer_tokens", "shown_characters"), 4)
    cells = real_multiplicity_cells(
        "qwen2.5-coder-1.5b-instruct",
        dtype="bfloat16",
        source=9,
        target=18,
        widths=[2, 4],
        curve_iterations=3,
        ablated=2,
        seed=0,
        **OF_A_FIT["fit"],
        **sizes,
    )
    assert [task for task, _ in cells] == [each_vector] * 2 + [ablated_model] * 5 + [training_curve] * 2
    assert [setting["fit"]["num_factors"] for _, setting in cells[-2:]] == [2, 4]
    assert {(setting["fit"]["fit_prompts"], setting["fit"]["iterations"]) for _, setting in cells[-2:]} == {(1, 3)}
