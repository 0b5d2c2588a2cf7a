import torch
from tiny import unit_rows

from dctlib import format_chat, score_vectors
from dctlib.evaluation.selection import best_per_method, candidates_table, judge_top_candidates
from dctlib.steering.generation import generate_completions

REQUESTS = ["w0 w1 w2", "w3", "w4 w5"]


def find(model, tokenizer, judge, **options):
    candidates = {"one": 5 * unit_rows(4, 32).float(), "two": 5 * unit_rows(2, 32, seed=1).float()}
    options = {"layer": 1, "multipliers": [1.0, 2.0], "count": 2, "max_new_tokens": 3, "progress": False} | options
    return candidates, judge_top_candidates(model, tokenizer, REQUESTS, candidates, judge, **options)


def test_finalists_are_the_highest_scores_of_each_method_and_multiplier(llama, tokenizer):
    judged = []

    def judge(requests, completions):
        judged.append(completions)
        return ["w" in completion for completion in completions]

    candidates, found = find(llama, tokenizer, judge)
    assert [(f.method, f.multiplier) for f in found] == [
        (m, k) for k in (1.0, 2.0) for m in ("one", "one", "two", "two")
    ]
    texts = format_chat(tokenizer, REQUESTS)
    for i, finalist in enumerate(found):
        vectors = finalist.multiplier * candidates[finalist.method]
        scores = score_vectors(llama, tokenizer, texts, vectors, layer=1, progress=False)
        place = scores.argsort(descending=True)[i % 2]
        torch.testing.assert_close(finalist.vector, vectors[place])
        said = generate_completions(
            llama, tokenizer, texts, layer=1, vector=vectors[place], max_new_tokens=3, progress=False
        )
        assert judged[i] == said
        assert finalist.success == sum("w" in answer for answer in said) / 3


def test_the_best_answers_most_and_then_scores_highest(llama, tokenizer):
    _, found = find(llama, tokenizer, lambda requests, completions: [True, False, False])
    best = best_per_method(found)
    assert list(best) == ["one", "two"]
    for method, finalist in best.items():
        assert finalist.score == max(f.score for f in found if f.method == method)


def test_a_scan_has_a_row_for_each_finalist(llama, tokenizer):
    _, found = find(llama, tokenizer, lambda requests, completions: [True] * len(completions))
    table = candidates_table(found)
    assert list(table) == ["method", "source", "multiplier", "score", "success"]
    assert len(table) == len(found)
    assert set(table["source"]) == {1}
