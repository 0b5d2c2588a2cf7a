import pytest
from tiny import tiny_tokenizer

from dctlib import format_chat
from dctlib.models.chat import tokenize


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
