import pytest

from dctlib.evaluation.thoughts import answer_of

CHANNELS = "<|channel|>analysis<|message|>This is illegal.<|end|><|start|>assistant<|channel|>final<|message|>Sure!"


@pytest.mark.parametrize(
    "completion",
    [
        "<think>\nThis is illegal.\n</think>\n\nSure!",
        "<think></think>Sure!",
        "<thinking>I cannot</thinking> Sure!",
        "<THINKING>I cannot</THINKING>Sure!",
        "<thought>I cannot</thought>Sure!",
        "<reasoning>I cannot</reasoning>\n<answer>\nSure!\n</answer>",
        "<seed:think>I cannot</seed:think>Sure!",
        "[THINK]I cannot[/THINK]Sure!",
        "◁think▷I cannot◁/think▷Sure!",
        "<|START_THINKING|>I cannot<|END_THINKING|><|START_RESPONSE|>Sure!<|END_RESPONSE|>",
        "<|begin_of_thought|>I cannot<|end_of_thought|>\n<|begin_of_solution|>Sure!<|end_of_solution|>",
        "<|channel>thought\nI cannot<channel|>Sure!",
        "<unused94>thought\nI cannot<unused95>Sure!",
        "<|inner_prefix|>I cannot<|inner_suffix|>Sure!",
        "Here is my thought process:\nI cannot\nHere is my response:\nSure!",
        CHANNELS,
        CHANNELS.replace("<|end|>", "<|end|><|start|>assistant<|channel|>commentary to=f <|message|>I cannot<|end|>"),
        "analysisThis is illegal.assistantfinalSure!",  # decoded without special tokens
        "I cannot</think>\n\nSure!",  # opened by the prompt
        "<think>a<think>b</think>c</think>Sure!",
        "<think>I write <think> first, then</think>Sure!",
        "<think>a</think><think>b</think>\nSure!",
        "<think>a</think>Sure!<think>I cannot</think>",
        "<think>a</think>Sure!\n<think>I cannot",
    ],
)
def test_thoughts_are_no_part_of_the_answer(completion):
    assert answer_of(completion) == "Sure!"


@pytest.mark.parametrize(
    "thought",
    [
        "<think>\nThis is ill",
        "[THINK]a",
        "<think>a</think>",
        "analysisThis is",
        "<|channel|>analysis<|message|>This is",
    ],
)
def test_a_thought_alone_holds_no_answer(thought):
    assert answer_of(thought) == ""


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "  Sure!\n",
        "Analysis: it works.",
        "analysis is a branch of mathematics",
        "Begin with `<think>` and go on.",
        "See [reasoning] and [analysis](a.html).",
        "I think so. <b>Yes</b> <answer>",
        "if a < thought and b > think: pass",
    ],
)
def test_an_answer_without_thoughts_stays_as_it_is(answer):
    assert answer_of(answer) == answer


def test_a_long_thought_is_skipped_in_no_time():
    for long in ("<think>" + "word " * 20_000 + "</think>Sure!", "<think>" * 2000 + "a" + "</think>" * 2000 + "Sure!"):
        assert answer_of(long) == "Sure!"
