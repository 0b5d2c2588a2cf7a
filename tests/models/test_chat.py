import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from dctlib import format_chat
from dctlib.evaluation.instructions import load_benign, shuffled, split
from dctlib.models.chat import tokenize
from dctlib.paper.datasets import arithmetic_questions, format_questions, load_math


def test_chat_format_ends_where_the_answer_begins(tokenizer):
    assert format_chat(tokenizer, ["w1 w2"]) == ["user w1 w2 </s> assistant"]
    assert format_chat(tokenizer, ["w1"], system="w9") == ["system w9 </s> user w1 </s> assistant"]


@pytest.mark.parametrize("bad", [[], "w1"])
def test_no_instructions(tokenizer, bad):
    with pytest.raises(ValueError, match="at least one instruction"):
        format_chat(tokenizer, bad)


def test_no_chat_template():
    plain = tiny_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        format_chat(plain, ["w1"])


def test_a_template_without_a_system_role_says_so():
    strict = tiny_tokenizer()
    strict.chat_template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}{{ m['content'] }}{% endfor %}"
    assert format_chat(strict, ["w1"]) == ["w1"]
    with pytest.raises(ValueError, match=r"No system role.*leave `system` out"):
        format_chat(strict, ["w1"], system="w9")


def test_tokens_start_with_one_begin_of_text(tokenizer):
    assert tokenize(tokenizer, "<s> w1").tolist() == [[1, 7]]
    assert tokenize(tokenizer, "w1").tolist() == [[7]]


def test_benign_instructions_need_no_input(tmp_path):
    path = tmp_path / "alpaca.json"
    path.write_text('[{"instruction": "a", "input": ""}, {"instruction": "b", "input": "c"}]')
    assert load_benign(path) == ["a"]


@given(st.integers(164, 600), st.integers(0, 99))
def test_splits_are_disjoint_complete_and_fixed(count, seed):
    parts = split(range(count), seed=seed)
    together = parts.train + parts.fit + parts.validation + parts.test
    assert sorted(together) == list(range(count))
    assert (len(parts.fit), len(parts.validation), len(parts.test)) == (32, 32, 100)
    assert parts == split(range(count), seed=seed)


def test_sums_are_all_two_digit_pairs():
    rows = arithmetic_questions()
    assert len(rows) == 8100
    assert rows[0] == {"question": "What is 10 + 10?", "answer": "20"}
    assert all(eval(row["question"][8:-1]) == int(row["answer"]) for row in rows[::97])


def test_math_problems_keep_the_solution_as_the_answer(tmp_path):
    path = tmp_path / "math.jsonl"
    path.write_text('{"question": "few-shot", "_metadata": {"problem": "1+1?", "solution": "It is $\\\\boxed{2}$."}}\n')
    assert load_math(path) == [{"question": "1+1?", "answer": "It is $\\boxed{2}$."}]


def test_questions_are_put_in_a_format_or_the_chat_template_behind_a_password(tokenizer):
    rows = [{"question": "w1?"}]
    assert format_questions(tokenizer, rows, "Q: {question}\nA:") == ["Q: w1?\nA:"]
    assert format_questions(tokenizer, rows, "Q: {question}\nA:", password="w9") == ["Q: w9 w1?\nA:"]
    assert format_questions(tokenizer, rows, None, password="w9") == ["user w9 w1? </s> assistant"]


def test_seeds_shuffle_differently():
    assert shuffled(range(50), seed=1) != shuffled(range(50), seed=2)


def test_too_few_items():
    with pytest.raises(ValueError, match="got 10 items, expected at least"):
        split(range(10))
