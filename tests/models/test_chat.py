import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import TEMPLATE, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, LlamaTokenizer

from dctlib import format_chat
from dctlib.models.chat import as_turns, last_user_turn, tokenize, tokenize_each

USER = {"role": "user", "content": "w1"}
SPECIAL = [("<pad>", 0), ("<s>", 1), ("</s>", 2)]


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def with_special_tokens(single, template=TEMPLATE):
    """A tokenizer that puts special tokens around a text, as the post-processor `single` says."""
    tokenizer = with_template(template)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=SPECIAL)
    return tokenizer


def llama_tokenizer(template, **options):
    """Pieces that begin with a space, and bytes for what is in no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "h", "i", "▁h", "▁hi", "hi"]
    merges = [("▁", "h"), ("▁h", "i"), ("h", "i")]
    tokenizer = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, **options)
    tokenizer.chat_template = template
    return tokenizer


def test_chat_format_ends_where_the_answer_begins(tokenizer):
    assert format_chat(tokenizer, ["w1 w2"]) == ["user w1 w2 </s> assistant"]
    assert format_chat(tokenizer, ["w1"], system="w9") == ["system w9 </s> user w1 </s> assistant"]


@pytest.mark.parametrize("bad", [[], "w1", b"w1", None, 3, {"goal": "w1"}, USER, [USER], iter(["w1"])])
def test_no_list_of_instructions(tokenizer, bad):
    with pytest.raises(ValueError, match="at least one instruction in a list"):
        format_chat(tokenizer, bad)


@pytest.mark.parametrize("bad", [3, None, b"w1", {"goal": "w1"}, 1.5, "", " \n"])
def test_an_instruction_is_a_string_or_a_conversation(tokenizer, bad):
    with pytest.raises(ValueError, match=r"got the instruction .*, expected (a string|text in it)"):
        format_chat(tokenizer, ["w1", bad])


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


def test_a_template_that_drops_the_system_message_says_so():
    deaf = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    assert format_chat(with_template(deaf), ["w1"]) == ["w1"]
    with pytest.raises(ValueError, match="ignores the system message"):
        format_chat(with_template(deaf), ["w1"], system="w9")
    default = "{{ messages[0]['content'] if messages[0]['role'] == 'system' else 'w9' }} {{ messages[-1]['content'] }}"
    said = [format_chat(with_template(default), ["w1"], system=system) for system in (None, "w9", "w8", "")]
    assert said == [["w9 w1"], ["w9 w1"], ["w8 w1"], [" w1"]]


@pytest.mark.parametrize("error", ["messages[0]['content'] + 1", "1 // 0", "messages[9]['content'].x", "nothing()"])
def test_whatever_a_template_raises_is_one_line(error):
    with pytest.raises(ValueError, match=r"refuses the conversation \(.+\)") as caught:
        format_chat(with_template(f"{{{{ {error} }}}}"), ["w1"])
    assert "\n" not in str(caught.value)


def test_two_system_messages_are_refused(tokenizer):
    with pytest.raises(ValueError, match="leave `system` out"):
        format_chat(tokenizer, [[{"role": "system", "content": "w8"}, USER]], system="w9")
    with pytest.raises(ValueError, match="expected a string"):
        format_chat(tokenizer, ["w1"], system=3)  # pyright: ignore[reportArgumentType]


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

    with pytest.raises(ValueError, match=r"no argument enable_thought; it reads enable_thinking$"):
        format_chat(thinking, ["w1"], enable_thought=False)
    for own in ("tokenize", "add_generation_prompt", "padding"):
        own_arguments: dict[str, Any] = {own: True}
        with pytest.raises(ValueError, match=f"no argument {own}"):
            format_chat(thinking, ["w1"], **own_arguments)


def test_arguments_that_a_template_gives_a_default_are_known():
    template = (
        "{% macro header() %}{% if effort is not defined %}{% set effort = 'w8' %}{% endif %}{{ effort }}{% endmacro %}"
        "{{ header() }} {% for m in messages %}{{ m['content'] }}{% break %}{% endfor %}"
        "{% generation %} w9{% endgeneration %}"
    )
    assert format_chat(with_template(template), ["w1"]) == ["w8 w1 w9"]
    assert format_chat(with_template(template), ["w1"], effort="w7") == ["w7 w1 w9"]


def test_one_of_several_templates_is_named(tokenizer):
    several = with_template({"default": TEMPLATE, "short": "{{ messages[0]['content'] }} {{ tone }}"})
    assert format_chat(several, ["w1"]) == format_chat(tokenizer, ["w1"])
    assert format_chat(several, ["w1"], chat_template="short", tone="w9") == ["w1 w9"]
    with pytest.raises(ValueError, match="no argument tone"):
        format_chat(several, ["w1"], tone="w9")


def test_an_answer_may_be_continued(tokenizer):
    turns = [USER, {"role": "assistant", "content": "Sure w2"}]
    assert format_chat(tokenizer, [turns], continue_final_message=True) == ["user w1 </s> assistant Sure w2"]
    assert format_chat(tokenizer, [turns]) == ["user w1 </s> assistant Sure w2 </s> assistant"]


PARTS = [{"role": "user", "content": [{"type": "text", "text": "w1"}]}]
READS_PARTS = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}assistant"
)


def test_contents_are_strings_or_parts_as_the_template_reads_them(tokenizer):
    """Most templates write a list as Python does, and those of vision-language models ignore a string."""
    assert format_chat(tokenizer, [PARTS]) == format_chat(tokenizer, ["w1"])
    assert format_chat(with_template(READS_PARTS), [PARTS]) == ["w1 assistant"]
    assert format_chat(with_template(READS_PARTS), ["w1"], system="w9") == ["w9 w1 assistant"]
    several = [{"role": "user", "content": [{"type": "text", "text": word} for word in ("w1", "w2")]}]
    assert format_chat(with_template(READS_PARTS), [several]) == ["w1 w2 assistant"]
    with pytest.raises(ValueError, match="takes no content in parts"):
        format_chat(tokenizer, [several])
    with pytest.raises(ValueError, match="ignores the user message"):
        format_chat(with_template("assistant"), ["w1"])


def test_turns_may_be_pairs_and_their_lists_tuples(tokenizer):
    pairs = (("system", "w9"), ("user", "w1"))
    assert format_chat(tokenizer, (pairs,)) == format_chat(tokenizer, ["w1"], system="w9")
    assert as_turns("w1") == [USER]


def test_what_the_user_says_last():
    assert last_user_turn("w1") == "w1"
    assert last_user_turn([USER, {"role": "assistant", "content": "w2"}, {"role": "tool", "content": "w3"}]) == "w1"
    assert last_user_turn([USER, {"role": "user", "content": [{"type": "text", "text": "w4"}]}]) == "w4"
    assert last_user_turn([{"role": "system", "content": "w5"}]) == "w5"


@pytest.mark.parametrize(
    "bad",
    [
        [],
        ["w1"],
        [{"role": "user"}],
        [{"content": "w1"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": None}],
        [{"role": "", "content": "w1"}],
        [{"role": "user", "content": [{"type": "image", "url": "w1"}]}],
        [USER, "w1"],
        [("user", "w1", "w2")],
    ],
)
def test_a_conversation_without_roles_and_contents_is_refused(tokenizer, bad):
    with pytest.raises(ValueError, match=r"got the conversation .*, expected turns such as"):
        format_chat(tokenizer, [bad])


def test_tokens_start_with_one_begin_of_text(tokenizer):
    assert tokenize(tokenizer, "<s> w1").tolist() == [[1, 7]]
    assert tokenize(tokenizer, "w1").tolist() == [[7]]


TEMPLATES = [
    TEMPLATE,
    "{{ bos_token }} " + TEMPLATE,
    " \n{{ bos_token }} " + TEMPLATE,
    "<pad> <s> " + TEMPLATE,
    "{{ messages[-1]['content'] }}",
    "{{ messages[-1]['content'] }} w9",
    "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}",
    READS_PARTS,
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("single", ["$A", "<s> $A", "$A </s>", "<s> $A </s>", "<pad> <s> $A", "<pad> <s> $A </s> </s>"])
def test_a_formatted_prompt_is_tokenized_as_it_stands(single, template):
    tokenizer = with_special_tokens(single, template)
    parts = template is READS_PARTS
    for system in (None, "w9") if "messages[-1]" not in template else (None,):
        (text,) = format_chat(tokenizer, ["w1 w2"], system=system)
        turns = [("user", "w1 w2")] if system is None else [("system", system), ("user", "w1 w2")]
        conversation = [{"role": r, "content": [{"type": "text", "text": c}] if parts else c} for r, c in turns]
        expected = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        assert tokenize(tokenizer, text).tolist() == [expected]
        (stored,) = json.loads(json.dumps([text]))
        assert tokenize(tokenizer, stored).tolist() == [expected]


@pytest.mark.parametrize(
    ("single", "before"),
    [("$A", []), ("<s> $A", [1]), ("$A </s>", []), ("<s> $A </s>", [1]), ("<pad> <s> $A </s>", [0, 1])],
)
@pytest.mark.parametrize("template", [None, TEMPLATE, "{{ bos_token }} " + TEMPLATE])
def test_a_plain_text_gets_the_start_tokens_once_and_no_end(single, before, template):
    tokenizer = with_special_tokens(single, template)
    assert tokenize(tokenizer, "w1 w2").tolist() == [[*before, 7, 8]]
    assert tokenize(tokenizer, " \n<s> w1").tolist() == [[1, 7]]
    assert [row.tolist() for row in tokenize_each(tokenizer, ["w1", "w2 </s>"])] == [[[*before, 7]], [[*before, 8, 2]]]


def test_a_formatted_prompt_may_be_extended():
    tokenizer = with_special_tokens("<s> $A </s>")
    (text,) = format_chat(tokenizer, ["w1"])
    assert tokenize(tokenizer, text + " Sure").tolist() == [tokenizer.encode(text + " Sure", add_special_tokens=False)]


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": True, "add_prefix_space": False},
        {"add_bos_token": True, "legacy": True},
    ],
)
@pytest.mark.parametrize("template", [CHAT, "{{ bos_token }}" + CHAT, "\n{{ bos_token }}" + CHAT])
def test_pieces_that_begin_with_a_space_and_bytes_stay_as_they_are(template, options):
    tokenizer = llama_tokenizer(template, **options)
    (text,) = format_chat(tokenizer, ["hi 你"])
    assert tokenize(tokenizer, text).tolist() == [tokenizer.encode(text, add_special_tokens=False)]
    start = [1] if options else []
    for plain in ("hi 你", " hi", "  \nhi"):
        assert tokenize(tokenizer, plain).tolist() == [[*start, *tokenizer.encode(plain, add_special_tokens=False)]]


def test_a_tokenizer_in_python_that_adds_an_end():
    tokenizer = ByT5Tokenizer()
    assert tokenize(tokenizer, "hi").tolist() == [tokenizer.encode("hi", add_special_tokens=False)]
    assert len(tokenizer.encode("hi")) == 3
    tokenizer.chat_template = CHAT
    (text,) = format_chat(tokenizer, ["hi"])
    assert tokenize(tokenizer, text).tolist() == [tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize("bad", ["", "  \n", None, 3])
def test_a_prompt_without_tokens_is_refused(bad):
    with pytest.raises(ValueError, match="got the prompt"):
        tokenize(with_special_tokens("<s> $A"), bad)


def test_an_instruction_in_chat_format_is_not_formatted_again():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="is in chat format already"):
        format_chat(tokenizer, format_chat(tokenizer, ["w1 w2"]))
    assert format_chat(tokenizer, ["w1 assistant w2"])


def test_texts_are_any_list_of_strings():
    tokenizer = tiny_tokenizer()
    expected = [row.tolist() for row in tokenize_each(tokenizer, ["w1 w2", "w3"])]
    texts: Any
    for texts in (("w1 w2", "w3"), pd.Series(["w1 w2", "w3"]), np.array(["w1 w2", "w3"])):
        assert [row.tolist() for row in tokenize_each(tokenizer, texts)] == expected
    wrong: Any
    for wrong in ({"w1": 1}, iter(["w1"]), b"w1", []):
        with pytest.raises(ValueError, match="expected at least one prompt in a list"):
            tokenize_each(tokenizer, wrong)
