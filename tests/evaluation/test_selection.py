import pytest
import torch
from tiny import unit_rows

from dctlib import format_chat, score_vectors, steer
from dctlib.evaluation.selection import Candidate, best_per_method, judge_top_candidates, select_and_test
from dctlib.steering.generation import generate_completions
from dctlib.steering.scoring import score_each, score_texts

D = 32
REQUESTS = ["w0 w1 w2", "w3", "w4 w5"]


def by_steering(model, tokenizer, texts, vector, **words):
    with steer(model, layer=2, vector=vector):
        return score_texts(model, tokenizer, texts, **words)


def test_vectors_are_ranked_on_validation_and_reported_on_test(llama, tokenizer, texts):
    candidates = {"DCT": 3 * unit_rows(9, D), "random": 2 * unit_rows(5, D, seed=1)}
    found = select_and_test(llama, tokenizer, candidates, validation=texts[:2], test=texts[2:], layer=2, progress=False)
    assert list(found.best) == list(found.best_by_score) == list(found.validation) == ["DCT", "random"]
    ranked = [by_steering(llama, tokenizer, texts[:2], vector).mean().item() for vector in candidates["DCT"]]
    assert torch.equal(found.best_by_score["DCT"].vector, candidates["DCT"][ranked.index(max(ranked))])
    assert torch.equal(found.clean.vector, torch.zeros(D))
    for chosen in (found.clean, *found.best.values(), *found.best_by_score.values()):
        expected = by_steering(llama, tokenizer, texts[2:], chosen.vector)
        torch.testing.assert_close(torch.tensor(chosen.scores), expected, rtol=1e-4, atol=1e-5)
        is_top1 = score_each(llama, tokenizer, texts[2:], chosen.vector[None], layer=2, progress=False).is_top1
        assert chosen.top1_rate == is_top1.float().mean().item()
    assert found.clean.scores != found.best["DCT"].scores


def test_the_two_rules_differ_where_the_highest_score_comes_without_the_word(llama, tokenizer, texts):
    candidates = {"DCT": 30 * unit_rows(200, D, seed=2)}
    found = select_and_test(llama, tokenizer, candidates, validation=texts[:2], test=texts[2:], layer=3, progress=False)
    scores = found.validation["DCT"]
    assert scores.best() != scores.best(min_top1=0)
    assert torch.equal(found.best["DCT"].vector, candidates["DCT"][scores.best()])
    assert torch.equal(found.best_by_score["DCT"].vector, candidates["DCT"][scores.best(min_top1=0)])


def test_a_selection_takes_other_words(llama, tokenizer, texts):
    candidates, words = {"DCT": 3 * unit_rows(3, D)}, {"positive": "w1", "negative": "w2"}
    parts = {"validation": texts[:2], "test": texts[2:]}
    found = select_and_test(llama, tokenizer, candidates, **parts, layer=2, progress=False, **words)
    clean = score_texts(llama, tokenizer, texts[2:], **words)
    torch.testing.assert_close(torch.tensor(found.clean.scores), clean, rtol=1e-4, atol=1e-5)


def test_nothing_is_ranked_on_what_is_reported(llama, tokenizer, texts):
    with pytest.raises(ValueError, match="1 texts are in both"):
        select_and_test(llama, tokenizer, {"DCT": unit_rows(2, D)}, validation=texts, test=texts[:1], layer=1)


def test_a_candidate_keeps_its_direction_at_other_lengths():
    candidate = Candidate(1, 3 * unit_rows(1, D)[0], "means")
    lengthened = candidate.at_lengths([1.0, 9.0])
    assert lengthened[0] is candidate
    assert [(each.layer, each.method) for each in lengthened] == [(1, "means")] * 3
    torch.testing.assert_close(
        torch.stack([each.vector for each in lengthened[1:]]), torch.tensor([[1], [9]]) * unit_rows(1, D)
    )


def find(model, tokenizer, judge, **options):
    candidates = {"one": 5 * unit_rows(4, 32).float(), "two": 5 * unit_rows(2, 32, seed=1).float()}
    options = {"layer": 1, "multipliers": [1.0, 2.0], "count": 2, "max_new_tokens": 3, "progress": False} | options
    return candidates, judge_top_candidates(model, tokenizer, REQUESTS, candidates, judge, **options)


def test_top_candidates_are_the_highest_scores_of_each_method_and_multiplier(llama, tokenizer):
    judged = []

    def judge(requests, completions):
        judged.append(completions)
        return ["w" in completion for completion in completions]

    candidates, found = find(llama, tokenizer, judge)
    assert [(f.method, f.multiplier) for f in found] == [
        (m, k) for k in (1.0, 2.0) for m in ("one", "one", "two", "two")
    ]
    texts = format_chat(tokenizer, REQUESTS)
    for i, candidate in enumerate(found):
        vectors = candidate.multiplier * candidates[candidate.method]
        scores = score_vectors(llama, tokenizer, texts, vectors, layer=1, progress=False)
        place = scores.argsort(descending=True)[i % 2]
        torch.testing.assert_close(candidate.vector, vectors[place])
        completions = generate_completions(
            llama, tokenizer, texts, layer=1, vector=vectors[place], max_new_tokens=3, progress=False
        )
        assert judged[i] == completions
        assert candidate.success == sum("w" in answer for answer in completions) / 3


def test_the_best_answers_most_and_then_scores_highest(llama, tokenizer):
    _, found = find(llama, tokenizer, lambda requests, completions: [True, False, False])
    best = best_per_method(found)
    assert list(best) == ["one", "two"]
    for method, candidate in best.items():
        assert candidate.score == max(f.score for f in found if f.method == method and f.score is not None)
