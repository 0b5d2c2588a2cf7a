import json
from typing import Any

import pytest
import torch
from tiny import tiny_model

from dctlib.discovery.pool import find_candidates
from dctlib.evaluation.instructions import Split
from dctlib.evaluation.judges import fraction_true
from dctlib.maps.causal import CausalMap
from dctlib.models.chat import format_chat
from dctlib.paper.experiments import search_steps as steps
from dctlib.paper.experiments.search_steps import STEPS, search_steps, search_steps_cells, summarise_steps
from dctlib.steering.generation import generate_completions, generate_per_vector

WORDS = [f"w{i} w{i + 1}" for i in range(60)]
ROWS = [{"question": words, "answer": str(i)} for i, words in enumerate(WORDS)]
MODEL = {"model": "tiny", "sha256": "0", "conversion": 1, "dtype": "float32"}
SETTING: dict[str, Any] = {
    "model": MODEL,
    "judge": MODEL,
    "source": 1,
    "target": 3,
    "nonlinearity": 0.3,
    "num_factors": 6,
    "iterations": 1,
    "max_damage": 1e9,
    "prompts": {"fit": 2, "validation": 4, "test": 8},
    "answer_tokens": 3,
    "seed": 0,
}


def is_odd(said):
    """A success that about half of a tiny model's completions are."""
    return len(said) % 2 == 1


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama", dtype=torch.float32)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, model, tokenizer):
    part = [WORDS[:4], WORDS[4:10], WORDS[10:20], WORDS[20:40]]
    rows = [[ROWS[WORDS.index(words)] for words in each] for each in part]
    monkeypatch.setattr(steps, "open_model", lambda name, dtype: (model, tokenizer))
    monkeypatch.setattr(steps, "harmful_instructions", lambda: Split(*part))
    monkeypatch.setattr(steps, "question_split", {"sums": Split(*rows)}.get)
    monkeypatch.setattr(steps, "benign_split", lambda: Split([], [], [], WORDS[40:60]))
    monkeypatch.setattr(steps, "grade_answers", lambda answers, rows: [*map(is_odd, answers)])
    monkeypatch.setattr(steps, "is_compliant", lambda *loaded, **bounds: [*map(is_odd, loaded[3])])


@pytest.fixture
def found():
    return search_steps(**SETTING, behaviour="sums")


def test_every_way_is_reported_on_the_other_half_of_the_test_requests(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found["choices"]) == {*STEPS, "unsteered", "random", "oracle"}
    assert {len(choice["solved"]) for choice in found["choices"].values()} == {4}
    assert all(found["choices"][name]["length"] == 1 for name in STEPS[:4])
    assert found["choices"]["random"]["source"] == "random"


def test_the_oracle_and_the_strongest_factor_are_those_of_the_pool(model, tokenizer, found):
    test = WORDS[20:28]
    cmap = CausalMap.from_model(model, tokenizer, format_chat(tokenizer, WORDS[4:6]), source=1, target=3)
    pool = find_candidates(cmap, 6, nonlinearity=0.3, iterations=1, seed=0)
    at_R = pool.input_scale * pool.directions
    texts = format_chat(tokenizer, test)
    rows = [row for row in range(len(pool)) if row not in pool.controls]
    options: dict[str, Any] = {"layer": 1, "max_new_tokens": 3, "progress": False}
    each = [[*map(is_odd, said)] for said in generate_per_vector(model, tokenizer, texts, at_R[rows], **options)]
    chosen_on = [fraction_true(solved[::2]) for solved in each]
    by_request = [fraction_true(verdicts) for verdicts in zip(*(solved[::2] for solved in each), strict=True)]
    best = chosen_on.index(max(chosen_on))
    assert found["choices"]["oracle"]["solved"] == each[best][1::2]
    assert found["any"] == pytest.approx(by_request)
    strongest = int(cmap(at_R[:6]).norm(dim=1).argmax())
    assert found["choices"]["strongest factor"]["solved"] == each[strongest][1::2]
    unsteered = generate_completions(model, tokenizer, texts, max_new_tokens=3, progress=False)
    assert found["choices"]["unsteered"]["solved"] == [*map(is_odd, unsteered[1::2])]


def test_ways_that_read_text_may_generate_about_as_many_tokens(found):
    tokens = {name: found["choices"][name]["tokens"] for name in STEPS}
    assert tokens["strongest factor"] == 0 and tokens["whole search"] is None
    assert 0 < tokens["read all"] <= tokens["halving"]
    assert tokens["own lengths"] == tokens["more sources"] > 0


def test_a_judge_is_given_for_sums_and_none_for_refusals(monkeypatch):
    judges = []
    search_vectors = steps.search_vectors

    def spy(*loaded, judge, **options):
        judges.append(judge)
        return search_vectors(*loaded, judge=judge, **options)

    monkeypatch.setattr(steps, "search_vectors", spy)
    search_steps(**SETTING, behaviour="refusal")
    search_steps(**SETTING, behaviour="sums")
    assert judges[0] is None and judges[1](WORDS[:2], ["a", "ab"]) == [True, False]
    with pytest.raises(ValueError, match="got behaviour='prayer', expected one of"):
        prayed: dict[str, Any] = SETTING | {"behaviour": "prayer"}
        search_steps(**prayed)


def test_a_search_that_finds_nothing_leaves_the_model_as_it_is(monkeypatch):
    monkeypatch.setattr(steps, "grade_answers", lambda answers, rows: [False for _ in answers])
    choices = search_steps(**SETTING, behaviour="sums")["choices"]
    assert choices["whole search"] == {"solved": [False] * 4, "source": None, "length": 0.0, "tokens": None}


def result(strongest, halving, oracle):
    rates = dict.fromkeys((*STEPS, "unsteered", "random"), [False] * 4)
    rates |= {"strongest factor": strongest, "halving": halving, "oracle": oracle}
    return {"any": [0.25, 0.75], "choices": {name: {"solved": solved, "tokens": 8} for name, solved in rates.items()}}


def test_the_gap_that_a_way_closes_is_a_ratio_of_means():
    few, more, most = [True] + [False] * 3, [True] * 2 + [False] * 2, [True] * 4
    found = summarise_steps([result(few, more, most), result(few, few, more)])
    assert found["halving"].each == [0.5, 0.25]
    assert found["halving"].closed == pytest.approx((0.375 - 0.25) / (0.75 - 0.25))
    assert found["strongest factor"].closed == 0 and found["oracle"].closed == 1
    assert found["any"].success.mean == 0.5 and found["any"].each == [0.5, 0.5]
    assert found["halving"].tokens == 8 and found["any"].tokens is None
    assert summarise_steps([result(most, few, most)] * 2)["halving"].closed is None


def test_cells_name_the_model_that_judges():
    names = ("fit_prompts", "validation", "test", "num_factors")
    rest: dict[str, Any] = dict.fromkeys(names, 4) | {"dtype": "float32", "sources": [8], "targets": [16]}
    name = "qwen2.5-coder-0.5b-instruct"
    ((_, own),) = search_steps_cells([name], behaviours=["refusal"], clean=None, **rest)
    ((_, other),) = search_steps_cells([name], behaviours=["refusal"], clean="smollm2-135m-instruct", **rest)
    assert own["judge"] == own["model"] and other["judge"]["model"] == "smollm2-135m-instruct"
    assert own["prompts"] == {"fit": 4, "validation": 4, "test": 4}
