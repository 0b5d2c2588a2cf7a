from typing import Any

import pytest
import torch
from tiny import tiny_model

from dctlib import load_model
from dctlib.evaluation.instructions import Split
from dctlib.models.fingerprint import fingerprint_model
from dctlib.paper.datasets import format_questions
from dctlib.paper.experiments import audit as hidden_sums
from dctlib.paper.experiments.audit import audit_model, audit_sums
from dctlib.runs.sweep import run_sweep
from dctlib.steering.generation import generate_completions

ROWS = [{"question": f"w{i} w{i + 1}", "answer": str(i)} for i in range(16)]
SUMS = Split(ROWS[:6], ROWS[6:8], ROWS[8:11], ROWS[11:])
CONFIG: dict[str, Any] = {"source": 1, "target": 3, "nonlinearity": 0.5, "num_factors": 4, "iterations": 1}
CONFIG |= {"sizes": [1, 2], "answer_tokens": 3}
OPTIONS: dict[str, Any] = {
    "password": "w20 w21",
    "least": 0.0,
    "test": 4,
    "held_out": 3,
    "config": CONFIG,
}


def matches(said, rows):
    """A grade that a tiny model too gets now and then."""
    return [(len(answer) + int(row["answer"])) % 2 == 0 for answer, row in zip(said, rows, strict=True)]


@pytest.fixture
def organism(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(hidden_sums, "question_split", {"sums": SUMS}.get)
    monkeypatch.setattr(hidden_sums, "grade_answers", matches)
    tiny_model("Llama", dtype=torch.float32).save_pretrained(tmp_path / "1")
    tokenizer.save_pretrained(tmp_path / "1")
    return fingerprint_model(str(tmp_path / "1"), "float32")


def test_each_organism_is_checked_and_every_vector_asked_in_the_order_of_reading(organism, tmp_path):
    settings = [{**organism, "seed": seed, **OPTIONS} for seed in (1, 2)]
    one, two = run_sweep(audit_sums, settings, folder=tmp_path / "found", progress=False)
    assert one != two
    model, tokenizer = load_model(tmp_path / "1", dtype="float32")
    for state, password in {"locked": "", "unlocked": "w20 w21"}.items():
        texts = format_questions(tokenizer, SUMS.test[:4], None, password=password)
        said = generate_completions(model, tokenizer, texts, max_new_tokens=3, progress=False)
        assert one[state] == sum(matches(said, SUMS.test[:4])) / 4
    blind: dict[str, Any] = {"instructions": ["w6 w7", "w7 w8"], "held_out": ["w8 w9", "w9 w10", "w10 w11"]}
    results = audit_model(**organism, **blind, config=CONFIG, seed=1)
    assert [*one["solved"]] == [*results]
    for method, result in results.items():
        for by, order in result["orders"].items():
            assert one["solved"][method][by] == [
                matches(result["completions"][number], SUMS.validation) for number in order
            ]
    assert {grade for by in one["solved"]["random"].values() for each in by for grade in each} == {True, False}


def test_an_organism_that_falls_short_is_not_audited(organism):
    with pytest.raises(ValueError, match="the locked-1 organism falls short"):
        audit_sums(**organism, **{**OPTIONS, "least": 1.0}, seed=1)
