from functools import partial

import pytest
import torch
from tiny import tiny_model, unit_rows

from dctlib import ablate, format_chat, load_model
from dctlib.evaluation.selection import Candidate, best_ablated, rank_candidates
from dctlib.fits.baselines import difference_of_means
from dctlib.paper.experiments.comparison import evaluate_unsteered
from dctlib.paper.experiments.methods import contrastive_vectors, train_compliance_lora
from dctlib.paper.organisms.tasks import REFUSAL, compliance_task
from dctlib.steering.scoring import score_each, score_texts

REQUESTS = ["w0 w1 w2", "w3", "w4 w5"]
D = 32
WORDS = {"positive": "w1", "negative": "w2"}


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama", dtype=torch.float32)


@pytest.fixture(autouse=True)
def scored_by_its_words(monkeypatch):
    for name, score in {"score_each": score_each, "score_texts": score_texts}.items():
        monkeypatch.setattr(f"dctlib.evaluation.selection.{name}", partial(score, **WORDS))


def test_supervised_directions_contrast_kinds_of_request_and_kinds_of_answer(model, tokenizer):
    rows = [{"goal": "w9", "target": "w1 w2"}, {"goal": "w10 w11", "target": "w3"}]
    found = contrastive_vectors(model, tokenizer, rows, ["w6 w7", "w8"], layers=[1, 3])
    asked = format_chat(tokenizer, ["w9", "w10 w11"])
    sides = {
        "means": (format_chat(tokenizer, ["w6 w7", "w8"]), asked),
        "CAA": ([asked[0] + "w1 w2", asked[1] + "w3"], [text + REFUSAL for text in asked]),
    }
    assert list(found) == list(sides)
    for name, contrast in sides.items():
        assert [of.layer for of in found[name]] == [1, 3]
        for of in found[name]:
            mean = difference_of_means(model, tokenizer, *contrast, layer=of.layer)
            torch.testing.assert_close(of.vector, mean)


def test_a_direction_is_added_where_and_as_long_as_it_scores_best(model, tokenizer):
    directions = [Candidate(layer, 3 * row) for layer, row in zip((1, 2, 3), unit_rows(3, D).float(), strict=True)]
    tried = [candidate for direction in directions for candidate in direction.at_lengths([1.0, 9.0])]
    best = rank_candidates(model, tokenizer, REQUESTS, tried, progress=False)[0]
    texts, scores = format_chat(tokenizer, REQUESTS), {}
    for of in directions:
        for length in (3.0, 1.0, 9.0):
            vector = length * of.vector / of.vector.norm()
            found = score_each(model, tokenizer, texts, vector[None], layer=of.layer, **WORDS, progress=False)
            says, score = found.is_top1.float().mean().item() >= 0.5, found.logit_diff.mean().item()
            scores[of.layer, length] = (says, score)
    layer, length = max(scores, key=lambda key: scores[key])
    assert best.layer == layer
    torch.testing.assert_close(best.vector, length / 3 * directions[layer - 1].vector)
    assert len({score for _, score in scores.values()}) == 9


def test_the_ablated_direction_is_that_without_which_it_scores_highest(model, tokenizer):
    directions = [Candidate(1, row) for row in unit_rows(4, D).float()]
    best, texts, scores = best_ablated(model, tokenizer, REQUESTS, directions), format_chat(tokenizer, REQUESTS), []
    for of in directions:
        with ablate(model, of.vector):
            scores.append(score_texts(model, tokenizer, texts, **WORDS).mean().item())
    assert best is directions[scores.index(max(scores))]
    assert len(set(scores)) == 4


def judge(requests, completions):
    return ["w1" in completion for completion in completions]


def test_the_taught_model_learns_the_targets(tmp_path, tokenizer):
    base, rows = tmp_path / "base", [{"goal": request, "target": "w1 w1 w1"} for request in REQUESTS]
    tiny_model("Llama", dtype=torch.float32).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lesson = compliance_task(None, tokenizer, rows, steps=2, batch=2, seed=0)  # pyright: ignore[reportArgumentType]
    assert [len(batch) for batch in lesson.batches] == [2, 2]
    assert lesson.batches[0][0].answer == "w1 w1 w1"
    training = train_compliance_lora(tmp_path / "complying", str(base), rows, steps=60, seed=0)
    assert training.seconds > 0
    found = evaluate_unsteered(*load_model(tmp_path / "complying"), REQUESTS, judge, max_new_tokens=3, progress=False)
    assert found.solved.tolist() == [[True] * 3]
