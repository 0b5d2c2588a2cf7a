import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_near, tiny_model, tiny_tokenizer, unit_rows

from dctlib import format_chat, steer
from dctlib.discovery.damage import everyday_questions, measure_damage, unsteered_answers
from dctlib.discovery.lengths import estimate_lengths, longest_within
from dctlib.models.likelihood import Example

INSTRUCTIONS = ["w0 w1", "w2 w3 w4", "w5"]
EXAMPLES = [
    Example(f"user {each} </s> assistant", answer, False)
    for each, answer in zip(INSTRUCTIONS, ("w9 w8 w7", "w6", "w5 w4"), strict=True)
]


def whole_model_damage(model, tokenizer, examples, vector, layer):
    found = []
    for example in examples:
        tokens = tokenizer(f"{example.prompt} {example.answer}", return_tensors="pt", add_special_tokens=False)[
            "input_ids"
        ]
        answer = len(example.answer.split())
        clean = model(tokens).logits[0, -answer - 1 : -1].log_softmax(-1)
        with steer(model, layer=layer, vector=vector):
            steered = model(tokens).logits[0, -answer - 1 : -1].log_softmax(-1)
        found.append((steered.exp() * (steered - clean)).sum(-1))
    return torch.cat(found).mean()


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2"])
def test_it_is_the_divergence_that_the_whole_model_shows(tokenizer, family):
    model = tiny_model(family)
    vectors = torch.tensor([[1.0], [6.0]]) * unit_rows(2, 32)
    found = measure_damage(model, tokenizer, EXAMPLES, vectors, layer=1)
    expected = torch.stack([whole_model_damage(model, tokenizer, EXAMPLES, vector, 1) for vector in vectors])
    assert_near(found.double(), expected, 1e-4)


def test_no_vector_does_no_damage(llama, tokenizer):
    assert measure_damage(llama, tokenizer, EXAMPLES, torch.zeros(1, 32), layer=2).tolist() == [0.0]


def test_answers_are_the_models_own(llama, tokenizer):
    answers = unsteered_answers(llama, tokenizer, INSTRUCTIONS, max_new_tokens=3)
    assert [each.prompt for each in answers] == format_chat(tokenizer, INSTRUCTIONS)
    tokens = tokenizer(answers[0].prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert answers[0].answer.split()[0] == tokenizer.decode(llama(tokens).logits[0, -1].argmax())


def test_an_answer_without_text_is_its_end(llama, tokenizer, monkeypatch):
    monkeypatch.setattr("dctlib.discovery.damage.generate_completions", lambda *_, **__: ["", "w6", ""])
    answers = unsteered_answers(llama, tokenizer, INSTRUCTIONS)
    assert [(each.answer, each.ends) for each in answers] == [("", True), ("w6", False), ("", True)]
    damage = measure_damage(llama, tokenizer, answers, 6 * unit_rows(1, 32), layer=1)
    spelled = [Example(each.prompt, each.answer or "</s>", False) for each in answers]
    torch.testing.assert_close(damage, measure_damage(llama, tokenizer, spelled, 6 * unit_rows(1, 32), layer=1))


def test_a_model_that_says_nothing_and_has_no_end_is_refused(llama, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    monkeypatch.setattr("dctlib.discovery.damage.generate_completions", lambda *_, **__: ["", "", ""])
    with pytest.raises(ValueError, match="answers none of 3 harmless requests"):
        unsteered_answers(llama, tokenizer, INSTRUCTIONS)


def limits_of(damage, count, start=1.0):
    """The limits of `count` vectors whose damage at a multiple is damage(row, multiple), with a bound of 1."""
    measured = []

    def measure(vectors):  # rows of the identity matrix times a multiple
        found = [
            (row, length) for row, length in zip(vectors.argmax(1).tolist(), vectors.amax(1).tolist(), strict=True)
        ]
        measured.extend(found)
        return torch.tensor([damage(row, length) for row, length in found])

    return longest_within(measure, torch.eye(count), 1.0, start=[start] * count), measured


def test_a_length_is_estimated_as_if_damage_were_quadratic():
    damages = torch.tensor([0.49, 1.96, 1e-6, 1e4, math.nan])
    assert estimate_lengths(lambda _: damages, torch.eye(5), 1.0) == pytest.approx([1.0, 0.5, 1.4, 0.25, 0.25])


@pytest.mark.parametrize("start", [0.3, 1.0, 1.4])
@pytest.mark.parametrize("power", [1.2, 2.0, 4.0])
def test_the_longest_length_within_the_bound_is_found_by_secants(power, start):
    true = [0.3, 0.6, 0.95, 1.3]
    limits, measured = limits_of(lambda row, length: (length / true[row]) ** power, len(true), start)
    for row, (limit, most) in enumerate(zip(limits, true, strict=True)):
        assert 0.8 ** (1 / power) * most <= limit <= most
        assert any(one == row and length == pytest.approx(limit) for one, length in measured)
        assert [one for one, _ in measured].count(row) <= 4


def test_a_harmless_vector_is_longest_and_a_harmful_one_has_no_length():
    limits, measured = limits_of(lambda row, length: 1e-4 + 1e4 * row, 2)
    assert limits == pytest.approx([1.4, 0.0])
    assert [row for row, _ in measured].count(0) == [row for row, _ in measured].count(1) == 2


def test_damage_that_is_not_a_number_is_beyond_the_bound():
    assert limits_of(lambda row, length: math.nan, 1)[0] == [0.0]
    limits, _ = limits_of(lambda row, length: math.nan if length > 0.5 else 0.1, 1)
    assert 0.25 <= limits[0] <= 0.5


@given(damages=st.lists(st.floats(0, 1e3) | st.just(math.nan), min_size=1, max_size=4))
def test_whatever_the_damage_a_limit_was_measured_to_be_within_the_bound(damages):
    calls = iter(damages * 4)
    limits, measured = limits_of(lambda row, length: next(calls), 1)
    assert limits == [0] or any(length == pytest.approx(limits[0]) for _, length in measured)
    assert 0 <= limits[0] <= 1.4


def test_our_harmless_requests_are_many_and_different():
    ours = everyday_questions()
    assert len(ours) == len(set(ours)) >= 24
    assert all(each.strip() == each and each for each in ours)
