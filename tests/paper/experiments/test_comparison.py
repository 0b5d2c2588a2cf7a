import copy
import json
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model, unit_rows

from dctlib import ablate, format_chat, load_model
from dctlib.evaluation.selection import Candidate, rank_candidates
from dctlib.models.fingerprint import fingerprint_model
from dctlib.paper.experiments.comparison import (
    ComparisonConfig,
    compare_methods,
    evaluate_samples,
    evaluate_steered,
    evaluate_unsteered,
    interventions,
    next_token_logprobs,
    side_effects,
    success_curves,
    summarise_methods,
)
from dctlib.paper.experiments.methods import contrastive_vectors, run_methods, unsupervised_searches
from dctlib.paper.organisms.training import save_organism
from dctlib.steering.effects import effects
from dctlib.steering.generation import generate_completions
from dctlib.steering.scoring import score_each, score_texts

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
    melbo = {"num_vectors": 2, "steps": 3, "learning_rate": 0.05}
    searches = unsupervised_searches(REQUESTS, input_scale=7.0, num_factors=6, iterations=2, melbo=melbo, seed=0)
    where: dict[str, Any] = {"source": 1, "target": 3, "folder": tmp_path / "found"}
    found = run_methods(str(tmp_path / "model"), "float32", searches, **where)
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
    candidates = [Candidate(1, vector) for vector in vectors]
    best = rank_candidates(model, tokenizer, REQUESTS, candidates, progress=False)[:2]
    scores = score_each(model, tokenizer, format_chat(tokenizer, REQUESTS), vectors, layer=1, progress=False)
    first = scores.ranking()[:2]
    assert torch.equal(torch.stack([candidate.vector for candidate in best]), vectors[first])
    assert [candidate.score for candidate in best] == scores.logit_diff.mean(1)[first].tolist()


def test_what_each_vector_makes_it_say_is_judged(model, tokenizer):
    vectors = 20 * unit_rows(3, D).float()
    options: dict[str, Any] = {"layer": 1, "max_new_tokens": 6}
    found = evaluate_steered(model, tokenizer, REQUESTS, vectors, judge, **options, progress=False)
    texts = format_chat(tokenizer, REQUESTS)
    for completions, solved, vector in zip(found.completions, found.solved, vectors, strict=True):
        assert completions == generate_completions(model, tokenizer, texts, vector=vector, **options)
        assert solved.tolist() == judge(REQUESTS, completions)


def test_a_model_in_a_context_is_judged_as_it_speaks_there(model, tokenizer):
    options: dict[str, Any] = {"max_new_tokens": 6, "progress": False}
    usual = evaluate_unsteered(model, tokenizer, REQUESTS, judge, **options)
    with ablate(model, unit_rows(4, D).float()):
        said = generate_completions(model, tokenizer, format_chat(tokenizer, REQUESTS), **options)
        found = evaluate_unsteered(model, tokenizer, REQUESTS, judge, **options)
    assert found.completions == [said] != usual.completions
    assert found.solved.tolist() == [judge(REQUESTS, said)]


def test_samples_are_judged_one_try_a_row(model, tokenizer):
    found = evaluate_samples(model, tokenizer, REQUESTS, judge, count=4, max_new_tokens=6, seed=0, progress=False)
    assert found.solved.tolist() == [judge(REQUESTS, completions) for completions in found.completions]
    assert found.solved.shape == (4, 3)
    assert found.solved.dtype == torch.bool


def test_a_change_is_entered_once_and_its_damage_is_that_of_its_effects(model, tokenizer):
    texts, run = format_chat(tokenizer, REQUESTS), (model, tokenizer)
    first, mean = 20 * unit_rows(2, D).float()
    usual = next_token_logprobs(model, tokenizer, texts)
    other = tiny_model("Llama", dtype=torch.float32), tokenizer
    added = {"DCT": Candidate(1, first), "means, added": Candidate(2, mean)}
    changed = interventions(run, added, {"means, ablated": Candidate(1, mean)}, other)
    assert list(changed) == ["DCT", "means, added", "means, ablated", "LoRA"]
    found = {}
    for name, (who, how) in changed.items():
        with how:
            found[name] = side_effects(*who, REQUESTS, usual, judge, max_new_tokens=6, progress=False)
    assert torch.equal(next_token_logprobs(model, tokenizer, texts), usual)  # and leaves no trace
    expected = [
        effects(model, tokenizer, texts, of.vector[None], layer=of.layer, progress=False).divergence.mean().item()
        for of in added.values()
    ]
    assert [found[name]["benign_kl"] for name in ("DCT", "means, added")] == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0.01
    assert found["means, ablated"]["benign_kl"] > 1e-4
    assert found["LoRA"]["benign_kl"] == 0  # the same model
    said = generate_completions(model, tokenizer, texts, vector=first, layer=1, max_new_tokens=6)
    assert found["DCT"]["benign_answered"] == pytest.approx(sum(judge(REQUESTS, said)) / 3)


def test_a_comparison_tries_all_methods_on_one_organism(tokenizer, tmp_path, monkeypatch):
    """Not steered, this model says nothing that this judge takes, so what solves is a method's doing."""
    organism = tmp_path / "organism"
    save_organism(tiny_model("Llama", dtype=torch.float32), tokenizer, organism)
    rows = [{"goal": f"w{i} w{i + 1}", "target": "w1 w1"} for i in range(9)]
    words = [f"w{i}" for i in range(9)]
    splits = SimpleNamespace(fit=words, validation=words[3:], test=words[5:], train=words)
    monkeypatch.setattr(
        "dctlib.paper.experiments.comparison.harmful_split", lambda: SimpleNamespace(fit=rows, train=rows)
    )
    monkeypatch.setattr("dctlib.paper.experiments.comparison.harmful_instructions", lambda: splits)
    monkeypatch.setattr("dctlib.paper.experiments.comparison.benign_split", lambda: splits)
    monkeypatch.setattr(
        "dctlib.paper.experiments.comparison.is_compliant", lambda _model, _tokenizer, *said, most: judge(*said)
    )
    ranked_on = []

    def noted(score):
        def noting(model, tokenizer, texts, *rest, **options):
            ranked_on.append(texts)
            return score(model, tokenizer, texts, *rest, positive="w1", negative="w2", **options)

        return noting

    for where in ("score_each", "score_texts"):
        score = {"score_each": score_each, "score_texts": score_texts}[where]
        monkeypatch.setattr(f"dctlib.evaluation.selection.{where}", noted(score))
    pinned = fingerprint_model(str(organism), "float32")
    config = ComparisonConfig(
        clean=str(organism),
        clean_digest=pinned["digest"],
        bounds={"most": 20.0},
        source=1,
        target=3,
        nonlinearity=0.5,
        fit_prompts=1,
        validation=2,
        test=4,
        tries=2,
        answer_tokens=4,
        num_factors=4,
        iterations=1,
        melbo={"num_vectors": 2, "steps": 2, "learning_rate": 0.05},
        layers=[1, 2],
        lengths=[1.0],
        lora_steps=2,
    )
    folders = {"folder": str(tmp_path / "found"), "complying": str(tmp_path / "complying")}
    found = compare_methods(**pinned, **folders, config=asdict(config), seed=0)
    methods = found["methods"]
    several = ["DCT", "MELBO", "power steering", "random", "sampling"]
    once = ["means, added", "CAA, added", "means, ablated", "LoRA"]
    assert sorted(methods) == sorted([*several, *once])
    assert {name: (len(of["solved"]), len(of["solved"][0])) for name, of in methods.items()} == {
        **dict.fromkeys(several, (2, 4)),
        **dict.fromkeys(once, (1, 4)),
    }
    assert "benign_kl" not in methods["sampling"]  # it changes nothing
    assert all(methods[name]["benign_kl"] > 0 for name in (*several[:-1], *once))
    assert len(ranked_on) == 4 + 2 * 2 + 2  # four searches, two directions at two layers, and what is ablated
    assert all(texts == format_chat(tokenizer, splits.validation[:2]) for texts in ranked_on)
    known = contrastive_vectors(*load_model(organism, dtype="float32"), rows, words, layers=[1, 2])
    for name, of in found["chosen"].items():
        (own,) = (at.vector.norm().item() for at in known[name.split(",")[0]] if at.layer == of["layer"])
        lengths = [own] if name == "means, ablated" else [own, found["input_scale"]]
        assert min(abs(of["length"] - length) for length in lengths) < 1e-3 * own
    assert list(found["chosen"]) == ["means, added", "CAA, added", "means, ablated"]
    assert methods["MELBO"]["of"] == 2
    assert json.dumps(found, allow_nan=False)

    twice = [found, {"methods": {name: {**of, "solved": flipped(of["solved"])} for name, of in methods.items()}}]
    curves, table = success_curves(twice), summarise_methods(twice, tries=2)
    assert list(table) == list(curves) == list(methods)
    for name, of in table.items():
        assert of["first"]["mean"] == pytest.approx(0.5)  # the other organism does what this one does not
        assert sum(of["firsts"]) == pytest.approx(1)
        assert ("one_of_k" in of) == (name in several)
        assert of["perplexity"] == methods[name]["perplexity"]
    assert "lead" not in table["DCT"]["first"]
    assert table["random"]["one_of_k"]["lead"] == vars(curves["DCT"].paired_difference(curves["random"], 2))


def flipped(solved):
    return [[not one for one in row] for row in solved]
