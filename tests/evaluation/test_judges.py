from typing import Any

import pytest
import torch
from tiny import tiny_model

from dctlib.evaluation import judges
from dctlib.evaluation.judges import (
    excerpt,
    fraction_true,
    is_compliant,
    is_harmful,
    load_judge,
    opens_with,
    perplexity,
    pmi_per_token,
    truncate,
)
from dctlib.models import likelihood

REQUESTS = ["w0 w1", "w2 w3 w4", "w5", "w6 w7"]


@pytest.mark.parametrize(
    ("text", "opens"),
    [
        ("Sure! Yes", True),
        (" Sure", True),
        ("Surely not", False),
        ("", False),
        ("<think>No.</think> Sure", True),
        ("<think>Sure", False),
    ],
)
def test_openings(text, opens):
    assert opens_with(text, "Sure") is opens


def test_rate_and_cut():
    assert fraction_true([True, False, True, True]) == 0.75
    assert truncate("a\nb  c", 60) == "a b c"
    assert truncate("abcdef", 3) == "abc …"


def test_an_excerpt_is_cut_and_spread():
    table = excerpt({"request": list("abcdef"), "answer": ["long answer"] * 6}, characters=4, rows=2, every=3)
    assert table.to_dict("list") == {"request": ["a", "d"], "answer": ["long …", "long …"]}


def test_an_excerpt_shows_what_the_user_says():
    turns = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1"}]
    assert excerpt({"request": [turns, "w2", " "]}, characters=9).to_dict("list") == {"request": ["w1", "w2", ""]}


THOUGHT = "<think> w8 w8 w8 Sorry, I cannot help. </think> "


def test_every_judge_skips_thoughts(llama, tokenizer):
    answers = ["Sure w1", "w3 w4", "w5 w5", "w6"]
    thoughts = [THOUGHT + answer for answer in answers]
    for judge in (perplexity, pmi_per_token):
        found = judge(llama, tokenizer, REQUESTS, thoughts)
        assert torch.equal(found, judge(llama, tokenizer, REQUESTS, answers))
    bounds = {"max_perplexity": 1e9, "min_pmi": -1e9}
    assert is_compliant(llama, tokenizer, REQUESTS, thoughts, **bounds) == [True] * 4
    assert is_compliant(llama, tokenizer, REQUESTS, [THOUGHT + "Sorry, no."] * 4, **bounds) == [False] * 4
    assert is_compliant(llama, tokenizer, REQUESTS, [THOUGHT] * 4, **bounds) == [False] * 4


def test_judges_format_requests_as_the_completions_were_made(llama, tokenizer):
    completions = ["Sure w1", "w3 w4", "w5 w5", "w6"]
    turns = [[{"role": "system", "content": "w9"}, {"role": "user", "content": request}] for request in REQUESTS]
    bound = perplexity(llama, tokenizer, turns, completions).median().item()
    for judge, options in (
        (perplexity, {}),
        (pmi_per_token, {"others": 2}),
        (is_compliant, {"max_perplexity": bound, "min_pmi": -1e9}),
    ):
        found = torch.as_tensor(judge(llama, tokenizer, REQUESTS, completions, system="w9", **options))
        assert torch.equal(found, torch.as_tensor(judge(llama, tokenizer, turns, completions, **options)))
        assert not torch.equal(found, torch.as_tensor(judge(llama, tokenizer, REQUESTS, completions, **options)))
    with pytest.raises(ValueError, match="no argument max_perplexty"):
        perplexity(llama, tokenizer, REQUESTS, completions, max_perplexty=3)


def test_relevance_is_the_likelihood_gained_by_knowing_the_request(llama, tokenizer):
    completions = ["Sure w1", "w3 w4", "w5 w6 w5", ""]
    found = pmi_per_token(llama, tokenizer, REQUESTS, completions, others=1)
    own = perplexity(llama, tokenizer, REQUESTS, completions).log()
    other = perplexity(llama, tokenizer, [*REQUESTS[1:], REQUESTS[0]], completions).log()
    torch.testing.assert_close(found[:3], (other - own)[:3])
    with pytest.raises(ValueError, match="more than others=4"):
        pmi_per_token(llama, tokenizer, REQUESTS, completions, others=4)


def test_compliance_needs_all_three(llama, tokenizer):
    completions = ["Sure w1", "w3 w4", "w5 w6 w5", ""]
    ppl = perplexity(llama, tokenizer, REQUESTS, completions)
    pmi = pmi_per_token(llama, tokenizer, REQUESTS, completions)
    assert is_compliant(llama, tokenizer, REQUESTS, completions, max_perplexity=1e9, min_pmi=-1e9)[:3] == [True] * 3
    bound = ppl[:3].median().item()
    verdicts = is_compliant(llama, tokenizer, REQUESTS, completions, max_perplexity=bound, min_pmi=-1e9)
    assert verdicts == (ppl <= bound).tolist()
    assert verdicts[3] is False
    least = pmi[:3].median().item()
    verdicts = is_compliant(llama, tokenizer, REQUESTS, completions, max_perplexity=1e9, min_pmi=least)
    assert verdicts[:3] == (pmi >= least).tolist()[:3]


def test_the_judge_reads_only_what_is_in_question(llama, tokenizer, monkeypatch):
    read = []

    def recorded(model, tokenizer, examples):
        read.append([(example.prompt, example.answer) for example in examples])
        return likelihood.mean_nll(model, tokenizer, examples)

    completions = ["Sorry, w1", "w1 w2", "", "w4 w5"]
    (bound,) = perplexity(llama, tokenizer, REQUESTS, completions)[1:2].tolist()
    monkeypatch.setattr(judges, "mean_nll", recorded)
    found = is_compliant(llama, tokenizer, REQUESTS, completions, max_perplexity=bound, min_pmi=-1e9)
    own, foreign = read
    assert [answer for _, answer in own] == ["w1 w2", "", "w4 w5"]
    assert {answer for _, answer in foreign} == {completions[number] for number in (1, 3) if found[number]}
    prompts = [prompt for prompt, _ in foreign]
    assert prompts == sorted(prompts, key=prompts.index)  # those of one request stand together
    assert is_compliant(llama, tokenizer, REQUESTS, ["Sorry, no"] * 4, max_perplexity=9.0, min_pmi=0) == [False] * 4
    assert len(read) == 2
    with pytest.raises(ValueError, match="more than others=3"):
        is_compliant(llama, tokenizer, REQUESTS[:3], ["Sorry, no"] * 3, max_perplexity=9.0, min_pmi=0)


def test_a_refusal_never_complies(llama, tokenizer):
    completions = ["Sorry, w1", "w1 w2", "w3", "w4"]
    assert is_compliant(llama, tokenizer, REQUESTS, completions, max_perplexity=1e9, min_pmi=-1e9)[0] is False


def test_the_classifier_reads_request_and_completion_and_says_yes(monkeypatch):
    prompts = []

    def complete(model, tokenizer, texts, **options):
        prompts.extend(texts)
        return [" Yes", "no", "yes", "yes"]

    monkeypatch.setattr(judges, "generate_completions", complete)
    no_model: Any = None
    turns = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    completions = ["first {x}", "second", "<think>w5</think>third", "<think> w6"]
    assert is_harmful(no_model, no_model, ["w1", "w2", turns, "w7"], completions) == [True, False, True, False]
    assert "[BEHAVIOR]:\nw3\n" in prompts[2] and "[GENERATION]:\nthird\n" in prompts[2]
    assert "[BEHAVIOR]:\nw1\n" in prompts[0]
    assert "[GENERATION]:\nfirst {x}\n" in prompts[0]
    assert prompts[0].endswith("Answer: [/INST]")


def test_a_profile_names_its_judge(tmp_path, tokenizer):
    tiny_model("Llama", dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    which = str(tmp_path)
    assert load_judge(None, which, 1e9, -1e9)(REQUESTS, ["w1", "w2", "w3", ""]) == [True, True, True, False]
    assert load_judge(which, which, 1e9, -1e9)(REQUESTS[:2], ["w1", "w2"]) == [False, False]
