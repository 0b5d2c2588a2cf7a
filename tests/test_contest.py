import copy
from typing import Any

import pytest
import torch
from conftest import tiny_model, unit_rows

from dctlib import ablate, format_chat, load_model
from dctlib.baselines import difference_of_means
from dctlib.contest import (
    changes,
    comply_lesson,
    damage,
    drawn,
    highest,
    next_token,
    spoken,
    steered,
    taught,
    told,
    unsupervised,
)
from dctlib.effects import effects
from dctlib.generate import complete
from dctlib.lessons import REFUSAL
from dctlib.organisms import save_organism
from dctlib.rank import score_each

REQUESTS = ["w0 w1 w2", "w3", "w4 w5"]
D = 32


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama", dtype=torch.float32)


def judge(requests, completions):
    assert len(requests) == len(completions)
    return ["w1" in completion for completion in completions]


def test_the_unsupervised_methods_enter_with_vectors_of_one_length(model, tokenizer, tmp_path):
    save_organism(copy.deepcopy(model), tokenizer, tmp_path / "model")  # saving makes it bfloat16
    settings: dict[str, Any] = {
        "num_factors": 6,
        "iterations": 2,
        "melbo_vectors": 2,
        "melbo_steps": 3,
        "melbo_learning_rate": 0.05,
        "seed": 0,
    }
    where: dict[str, Any] = {"source": 1, "target": 3, "folder": tmp_path / "found"}
    found = unsupervised(str(tmp_path / "model"), "float32", REQUESTS, input_scale=7.0, **settings, **where)
    assert {method: len(entrant.vectors) for method, entrant in found.items()} == {
        "DCT": 6,
        "MELBO": 2,
        "power steering": 6,
        "random": 6,
    }
    for entrant in found.values():
        torch.testing.assert_close(entrant.vectors.norm(dim=1), torch.full((len(entrant.vectors),), 7.0))
    assert (found["random"].forward, found["random"].backward) == (0, 0)
    assert found["MELBO"].backward == 2 * 3
    assert found["DCT"].backward == 32 + 2 * 6  # the projected start, and two sweeps
    torch.testing.assert_close(found["power steering"].vectors[:3], -found["power steering"].vectors[3:])


def test_the_highest_are_the_first_of_the_ranking(model, tokenizer):
    vectors = 10 * unit_rows(5, D).float()
    best = highest(model, tokenizer, REQUESTS, vectors, layer=1, count=2, progress=False)
    scores = score_each(model, tokenizer, format_chat(tokenizer, REQUESTS), vectors, layer=1, progress=False)
    assert torch.equal(best, vectors[scores.ranking()[:2]])


def test_what_each_vector_makes_it_say_is_judged(model, tokenizer):
    vectors = 20 * unit_rows(3, D).float()
    options: dict[str, Any] = {"layer": 1, "max_new_tokens": 6}
    found = steered(model, tokenizer, REQUESTS, vectors, judge, **options, progress=False)
    texts = format_chat(tokenizer, REQUESTS)
    for said, solved, vector in zip(found.said, found.solved, vectors, strict=True):
        assert said == complete(model, tokenizer, texts, vector=vector, **options)
        assert solved.tolist() == judge(REQUESTS, said)


def test_told_contrasts_kinds_of_request_and_kinds_of_answer(model, tokenizer):
    rows = [{"goal": "w9", "target": "w1 w2"}, {"goal": "w10 w11", "target": "w3"}]
    vectors = told(model, tokenizer, rows, ["w6 w7", "w8"], layer=1, norm=5.0)
    asked = format_chat(tokenizer, ["w9", "w10 w11"])
    sides = {
        "means, added": (format_chat(tokenizer, ["w6 w7", "w8"]), asked),
        "CAA, added": ([asked[0] + "w1 w2", asked[1] + "w3"], [text + REFUSAL for text in asked]),
    }
    assert list(vectors) == list(sides)
    for name, contrast in sides.items():
        mean = difference_of_means(model, tokenizer, *contrast, layer=1)
        torch.testing.assert_close(vectors[name], 5 * mean / mean.norm())


def test_a_model_in_a_context_is_judged_as_it_speaks_there(model, tokenizer):
    options: dict[str, Any] = {"max_new_tokens": 6, "progress": False}
    usual = spoken(model, tokenizer, REQUESTS, judge, **options)
    with ablate(model, unit_rows(4, D).float()):
        said = complete(model, tokenizer, format_chat(tokenizer, REQUESTS), **options)
        found = spoken(model, tokenizer, REQUESTS, judge, **options)
    assert found.said == [said] != usual.said
    assert found.solved.tolist() == [judge(REQUESTS, said)]


def test_samples_are_judged_one_try_a_row(model, tokenizer):
    found = drawn(model, tokenizer, REQUESTS, judge, count=4, max_new_tokens=6, seed=0, progress=False)
    assert found.solved.tolist() == [judge(REQUESTS, said) for said in found.said]
    assert found.solved.shape == (4, 3)
    assert found.solved.dtype == torch.bool


def test_a_change_is_entered_once_and_its_damage_is_that_of_its_effects(model, tokenizer):
    texts, run = format_chat(tokenizer, REQUESTS), (model, tokenizer)
    first, mean = 20 * unit_rows(2, D).float()
    usual = next_token(model, tokenizer, texts)
    other = tiny_model("Llama", dtype=torch.float32), tokenizer
    changed = changes(run, {"DCT": first}, {"means, added": mean}, other, layer=1)
    assert list(changed) == ["DCT", "means, added", "means, ablated", "LoRA"]
    found = {}
    for name, (who, how) in changed.items():
        with how:
            found[name] = damage(*who, REQUESTS, usual, judge, max_new_tokens=6, progress=False)
    assert torch.equal(next_token(model, tokenizer, texts), usual)  # and leaves no trace
    vectors = torch.stack([first, mean])
    expected = effects(model, tokenizer, texts, vectors, layer=1, progress=False).divergence.mean(1).tolist()
    assert [found[name]["benign_kl"] for name in ("DCT", "means, added")] == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0.01
    assert found["means, ablated"]["benign_kl"] > 1e-4
    assert found["LoRA"]["benign_kl"] == 0  # the same model
    said = complete(model, tokenizer, texts, vector=first, layer=1, max_new_tokens=6)
    assert found["DCT"]["benign_answered"] == pytest.approx(sum(judge(REQUESTS, said)) / 3)


def test_the_taught_model_learns_the_targets(tmp_path, tokenizer):
    base, rows = tmp_path / "base", [{"goal": request, "target": "w1 w1 w1"} for request in REQUESTS]
    tiny_model("Llama", dtype=torch.float32).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lesson = comply_lesson(None, tokenizer, rows, steps=2, batch=2, seed=0)  # pyright: ignore[reportArgumentType]
    assert [len(batch) for batch in lesson.batches] == [2, 2]
    assert lesson.batches[0][0].answer == "w1 w1 w1"
    training = taught(tmp_path / "complying", str(base), rows, steps=60, seed=0)
    assert training.seconds > 0
    found = spoken(*load_model(tmp_path / "complying"), REQUESTS, judge, max_new_tokens=3, progress=False)
    assert found.solved.tolist() == [[True] * 3]
