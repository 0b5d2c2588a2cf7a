from dctlib.paper.datasets import arithmetic_questions, format_questions, load_math


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
