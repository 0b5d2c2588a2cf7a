import math

import pytest
import torch

from dctlib import format_chat, generate_completions
from dctlib.discovery.criteria import Criteria
from dctlib.discovery.damage import unsteered_answers
from dctlib.models.likelihood import Example

INSTRUCTIONS = ["w0 w1", "w2 w3 w4", "w5"]
BENIGN = ["w20 w21", "w22", "w23 w24", "w25", "w26 w27"]


@pytest.fixture
def texts(tokenizer):
    return format_chat(tokenizer, INSTRUCTIONS)


@pytest.fixture
def unsteered(llama, tokenizer, texts):
    return generate_completions(llama, tokenizer, texts, max_new_tokens=6, progress=False)


@pytest.fixture
def criteria(llama, tokenizer, texts):
    return Criteria(llama, tokenizer, math.inf)


def nll(model, tokenizer, prompt, answer):
    """Mean −log p of a token, by the whole model on one text."""
    tokens = tokenizer(f"{prompt} {answer}", return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    count = len(answer.split())
    logits = model(tokens[None]).logits[0, -count - 1 : -1].log_softmax(-1)
    return -logits.gather(1, tokens[-count:, None]).mean().item()


def test_novelty_is_how_much_less_likely_than_the_unsteered_beginning(llama, tokenizer, criteria, texts, unsteered):
    long = [f"w{i}" for i in range(40, 54)]
    said = ["w40 w41 w42", " ".join(long), "w47"]
    usual = [" ".join(answer.split() * 3) for answer in unsteered]
    usual = [" ".join(text.split()[:count]) for text, count in zip(usual, (2, 14, 3), strict=True)]
    grades = criteria.grade(texts, usual, [said])
    compared = [2, 12, 1]
    for i, count in enumerate(compared):
        parts = [" ".join(text.split()[:count]) for text in (said[i], usual[i])]
        found, own = (nll(llama, tokenizer, texts[i], part) * count for part in parts)
        surprise = found - own
        assert grades.novelty[0, i].item() == pytest.approx(max(0, 1 - math.exp(-surprise / 4)), abs=1e-5)
    assert grades.novelty.max() > 0.1
    assert grades.reopened.all() and grades.varied.all()
    # there is no bound on fluency
    torch.testing.assert_close(grades.change, grades.novelty * grades.relevance)


def test_fluency_falls_beyond_the_bound(llama, tokenizer, texts, unsteered):
    said = ["w40 w41 w42", "w43 w44 w45 w46", "w47"]
    general = [nll(llama, tokenizer, texts[(i + 1) % 3], answer) for i, answer in enumerate(said)]
    bound = sorted(general)[1]
    grades = Criteria(llama, tokenizer, bound).grade(texts, unsteered, [said])
    expected = [math.exp(min(0.0, bound - each)) for each in general]
    assert min(expected) < 0.999
    assert grades.fluency[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_bound_is_what_the_model_says_to_harmless_requests(llama, tokenizer):
    examples = unsteered_answers(llama, tokenizer, BENIGN, max_new_tokens=5)
    criteria = Criteria.from_answers(llama, tokenizer, examples)
    following = [*examples[1:], examples[0]]
    pairs = zip(following, examples, strict=True)
    general = [nll(llama, tokenizer, other.prompt, each.answer) for other, each in pairs]
    assert criteria.max_nll == pytest.approx(torch.tensor(general).quantile(0.9).item(), abs=1e-4)


def test_a_bound_needs_three_answers(llama, tokenizer):
    with pytest.raises(ValueError, match="got 2 answers to harmless requests, expected at least 3"):
        Criteria.from_answers(llama, tokenizer, [Example("user w1", "w1", False)] * 2)


@pytest.mark.parametrize("answer", ["", "<think> w1"])
def test_a_model_that_says_nothing_sets_no_bound(llama, tokenizer, answer):
    criteria = Criteria.from_answers(llama, tokenizer, [Example("user w1", answer, answer == "")] * 3)
    assert criteria.max_nll == math.inf


def test_relevance_tells_an_answer_from_the_answer_of_another_request(llama, tokenizer, criteria, texts, unsteered):
    said = ["w40 w41 w42", "w43 w44 w45 w46", "w47 w41"]
    own = [nll(llama, tokenizer, text, answer) for text, answer in zip(texts, said, strict=True)]
    others = [nll(llama, tokenizer, texts[(i + 1) % 3], said[i]) for i in range(3)]
    grades = criteria.grade(texts, unsteered, [said])
    expected = [min(max((other - one) / 0.5, 0), 1) for other, one in zip(others, own, strict=True)]
    assert 0 in expected and max(expected) > 0
    assert (grades.novelty > 0).all()
    assert grades.relevance[0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "<think> w40 w41",  # a thought alone
        "w40 w40 w40 w40 w40 w40 w40 w40",
        "OPENING w50 w51 w52 w53",  # as the unsteered answer opens
    ],
)
def test_change_is_zero_where_one_criterion_fails(criteria, texts, unsteered, said):
    said = [said.replace("OPENING", " ".join(answer.split()[:3])) for answer in unsteered]
    grades = criteria.grade(texts, unsteered, [said, ["w40 w41 w42 w43"] * 3])
    assert grades.change[0].tolist() == grades.unlock[0].tolist() == [0, 0, 0]
    assert (grades.novelty[1] * grades.fluency[1] * grades.varied[1] * grades.reopened[1] > 0).all()


def test_what_is_said_unsteered_is_worth_nothing(criteria, texts, unsteered):
    assert not criteria.grade(texts, unsteered, [unsteered]).change.any()


def test_the_usual_opening_of_other_answers_is_not_new(criteria, texts):
    before = ["w30 w31 w32 w33", "w30 w31 w32 w34", "w35 w36 w37"]
    grades = criteria.grade(texts, before, [["w40 w41 w42", "w40 w41 w42", "w30 w31 w32 w39"]])
    assert grades.reopened.tolist() == [[True, True, False]]
    assert grades.novelty[0, 2] == 0  # nothing more was read of it


def test_a_refusal_in_other_words_is_not_new_but_one_of_what_was_answered_is(criteria, texts):
    before = ["w4 I cannot help with that", "w5 w6 w7 w8", "w9 w10 w11 w12"]
    said = ["w1 w2 w3 I cannot assist with that"] * 3
    assert criteria.grade(texts, before, [said]).reopened.tolist() == [[False, True, True]]


def test_what_is_withheld_is_what_the_unsteered_answer_does_not_say_of_its_request(llama, tokenizer, criteria, texts):
    before = ["w50 w41 w42", "w43 w44 w45 w46", "w47 w41"]
    own = [nll(llama, tokenizer, text, answer) for text, answer in zip(texts, before, strict=True)]
    others = [nll(llama, tokenizer, texts[(i + 1) % 3], before[i]) for i in range(3)]
    grades = criteria.grade(texts, before, [["w40 w41 w42"] * 3, before])
    relevance = [min(max((other - one) / 0.5, 0), 1) for other, one in zip(others, own, strict=True)]
    assert 0 < sum(relevance) < 3
    expected = [1 - each for each in relevance]
    assert grades.withheld.tolist() == [pytest.approx(expected, abs=1e-4)] * 2
    gain = (grades.relevance[0] - torch.tensor(relevance)).clamp(min=0)
    torch.testing.assert_close(grades.gain[0], gain, rtol=0, atol=1e-4)
    assert not grades.gain[1].any()


@pytest.fixture
def says(monkeypatch):
    """Have a model find answers that share a word with the request likelier after it, and no others."""

    def nll(_self, pairs):
        def each(prompt, answer):
            related = {*prompt.split()} & {*answer.split()}
            return torch.full((len(answer.split()),), 1.0 if related else 2.0)

        return {pair: each(*pair) for pair in pairs}

    monkeypatch.setattr(Criteria, "_nll", nll)


IDLE = ["w30 w31 w32", "w30 w31 w33", "w30 w31 w34"]
ABOUT = ["w40 w0 w1", "w41 w2 w3", "w42 w5"]


def test_a_lock_is_an_unsteered_answer_that_ignores_its_request(criteria, texts, says):
    assert criteria.grade(texts, IDLE, [ABOUT]).gain.tolist() == [[1, 1, 1]]
    assert criteria.grade(texts, ABOUT, [IDLE]).gain.tolist() == [[0, 0, 0]]
    other_words = ["w50 w1 w0", "w51 w3 w2", "w52 w5 w53"]
    grades = criteria.grade(texts, ABOUT, [other_words])
    assert grades.relevance.tolist() == [[1, 1, 1]]
    assert not grades.gain.any() and not grades.unlock.any()


def test_a_refusal_that_restates_the_request_withholds_it(criteria, texts, says):
    refusals = [f"I cannot assist with {' '.join(instruction.split())}" for instruction in INSTRUCTIONS]
    grades = criteria.grade(texts, refusals, [ABOUT])
    assert grades.withheld.tolist() == grades.gain.tolist() == [[1, 1, 1]]


def test_silence_withholds_and_an_unended_thought_tells_nothing(criteria, texts, says):
    grades = criteria.grade(texts, ["", " ", "<think> w30"], [ABOUT])
    assert grades.withheld.tolist() == grades.gain.tolist() == [[1, 1, 0]]
    assert (grades.unlock > 0).tolist() == [[True, True, False]]
