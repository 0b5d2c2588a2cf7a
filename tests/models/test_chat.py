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
    refuse = "{% if m['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    strict.chat_template = f"{{% for m in messages %}}{refuse}{{{{ m['content'] }}}}{{% endfor %}}"
    assert format_chat(strict, ["w1"]) == ["w1"]
    with pytest.raises(ValueError, match=r"No system role.*leave `system` out"):
        format_chat(strict, ["w1"], system="w9")


def test_an_item_may_be_a_whole_conversation(tokenizer):
    turns = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    said = "user w1 </s> assistant w2 </s> user w3 </s> assistant"
    assert format_chat(tokenizer, [turns, "w4"]) == [said, "user w4 </s> assistant"]
    assert format_chat(tokenizer, [turns], system="w9") == [f"system w9 </s> {said}"]


def test_the_template_takes_further_arguments():
    thinking = tiny_tokenizer()
    thinking.chat_template = "{{ messages[-1]['content'] }}{% if enable_thinking is not false %} w9{% endif %}"
    assert format_chat(thinking, ["w1"]) == ["w1 w9"]
    assert format_chat(thinking, ["w1"], enable_thinking=False) == ["w1"]


@pytest.mark.parametrize("bad", [[], ["w1"], [{"role": "user"}]])
def test_a_conversation_without_roles_and_contents_is_refused(tokenizer, bad):
    with pytest.raises(ValueError, match=r"got the conversation .*, expected turns such as"):
        format_chat(tokenizer, [bad])


def test_one_conversation_in_place_of_a_list_is_refused(tokenizer):
    with pytest.raises(ValueError, match="at least one instruction"):
        format_chat(tokenizer, [{"role": "user", "content": "w1"}])  # pyright: ignore[reportArgumentType]


def test_tokens_start_with_one_begin_of_text(tokenizer):
    assert tokenize(tokenizer, "<s> w1").tolist() == [[1, 7]]
    assert tokenize(tokenizer, "w1").tolist() == [[7]]
