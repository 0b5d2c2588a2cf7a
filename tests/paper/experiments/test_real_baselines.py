import json
from typing import Any

import pytest
import torch
from tiny import tiny_model

from dctlib.evaluation.instructions import Split
from dctlib.paper.experiments import real_baselines, sample_complexity
from dctlib.paper.experiments.real_baselines import (
    at_equal_damage,
    choose_within,
    real_baselines_cells,
    summarise_methods,
)

REQUESTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(40)]
SETTING: dict[str, Any] = {
    "model": {"model": "tiny", "sha256": "0", "conversion": 1, "dtype": "float32"},
    "slice_ends": {"source": 1, "target": 3},
    "fits": {"nonlinearity": 0.3, "num_factors": 4, "iterations": 1},
    "prompts": {"fit": 2, "pool": 8, "validation": 4, "test": 4, "benign": 6, "supervised": 3},
    "multiples": [0.5, 1.0],
    "max_damage": 0.5,
    "tokens": {"validation": 2, "test": 3, "shown": 8},
    "seed": 0,
}


@pytest.fixture
def llama(monkeypatch, tokenizer):
    model = tiny_model("Llama", dtype=torch.float32)
    harmful = Split(REQUESTS[30:], REQUESTS[:4], REQUESTS[4:12], REQUESTS[12:20])
    monkeypatch.setattr(real_baselines, "open_model", lambda name, dtype: (model, tokenizer))
    monkeypatch.setattr(real_baselines, "harmful_instructions", lambda: harmful)
    monkeypatch.setattr(real_baselines, "benign_split", lambda: Split(REQUESTS[20:30], [], [], REQUESTS[30:]))
    monkeypatch.setattr(real_baselines, "scale_and_refusal_token", lambda *_: (3.0, "w9"))
    monkeypatch.setattr(real_baselines, "draw_instructions", lambda *_: tuple(REQUESTS[:2]))
    score_each = sample_complexity.score_each
    monkeypatch.setattr(
        sample_complexity, "score_each", lambda *args, **options: score_each(*args, positive="w8", **options)
    )
    return model


METHODS = ["DCT", "projected linear", "power steering", "MELBO", "random", "difference of means"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_tried_at_every_length_and_one_vector_is_tested(llama, method):
    found = at_equal_damage(**SETTING, method=method, shuffle=0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(found["grid"]) == (2 if method == "difference of means" else 8)
    assert found["length"] == pytest.approx(found["grid"][found["chosen"]]["multiple"], rel=1e-4)
    assert len(found["verdicts"]) == 4 and found["damage"] > 0 and found["found"]


def test_no_vector_does_no_damage(llama):
    found = at_equal_damage(**SETTING, method="unsteered", shuffle=0)
    assert found["damage"] == pytest.approx(0, abs=1e-6) and found["length"] == 0 and not found["found"]


def test_an_unknown_method_is_named(llama):
    prayed: dict[str, Any] = SETTING | {"method": "prayer"}
    with pytest.raises(ValueError, match="got method='prayer', expected one of"):
        at_equal_damage(**prayed, shuffle=0)


def test_chosen_is_the_most_answers_within_the_bound_then_the_least_damage():
    grid = [{"answered": a, "damage": d} for a, d in [(0.5, 0.4), (1.0, 0.9), (0.5, 0.3), (0.2, 0.1)]]
    assert choose_within(grid, 0.5) == 2
    assert choose_within(grid, 1.0) == 1
    assert choose_within(grid, 0.05) == 3, "if none is within the bound, the least damage"


def test_cells_go_shuffle_by_shuffle_and_need_no_model():
    names = ("fit_prompts", "pool", "validation", "test", "benign", "supervised", "num_factors", "iterations")
    rest: dict[str, Any] = dict.fromkeys(names, 4) | {"nonlinearity": 0.5, "source": 9, "target": 18, "seed": 0}
    cells = real_baselines_cells(
        "qwen2.5-coder-1.5b-instruct", dtype="bfloat16", methods={"DCT": 2, "search": 1}, **rest
    )
    order = [(setting["method"], setting["shuffle"]) for _, setting in cells]
    assert order == [("unsteered", 0), ("DCT", 0), ("search", 0), ("DCT", 1)]


def test_a_summary_averages_shuffles_and_an_edited_model_has_no_length():
    def result(answered, length):
        verdicts = [{"compliant": each, "refused": not each} for each in answered]
        return {"verdicts": verdicts, "damage": 0.1, "length": length, "seconds": 90, "found": True}

    settings = [{"method": "DCT"}, {"method": "heretic"}, {"method": "DCT"}]
    results = [result([True, True], 0.5), result([True, False], None), result([True, False], 1.5)]
    summary = summarise_methods(settings, results, test=2)
    assert list(summary) == ["DCT", "heretic"]
    assert summary["DCT"]["each"] == [1, 0.5] and summary["DCT"]["success"]["mean"] == 0.75
    assert (summary["DCT"]["refused"], summary["DCT"]["length"], summary["DCT"]["minutes"]) == (0.25, 1, 1.5)
    assert summary["heretic"]["length"] is None and summary["heretic"]["found"] == 1
