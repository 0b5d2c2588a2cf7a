"""Answers of models that think aloud first."""

import re

_NAME = r"(?:[a-z]+[:_])?(?:think(?:ing)?|thoughts?|thought_process|reason(?:ing)?|reflection|scratchpad|analysis|cot)"
# <think>, [THINK], <seed:think>, ◁think▷, <|think|>, <|START_THINKING|>, <|begin_of_thought|>, and others alike
_OPEN = (
    rf"<\|?{_NAME}\|?>|\[think(?:ing)?\]|◁{_NAME}▷|<\|(?:start|begin)_(?:of_)?{_NAME}\|>|<\|inner_prefix\|>|<unused94>"
    rf"|<\|channel>{_NAME}\b|^here is my thought process:"
)
_CLOSE = (
    rf"<\|?/{_NAME}\|?>|\[/think(?:ing)?\]|◁/{_NAME}▷|<\|end_(?:of_)?{_NAME}\|>|<\|inner_suffix\|>|<unused95>"
    rf"|<channel\|>|^here is my response:"
)
_BOUND = re.compile(rf"(?P<end>{_CLOSE})|{_OPEN}", re.IGNORECASE | re.MULTILINE)
# gpt-oss writes channels, of which the final one is the answer; a decoder that skips special tokens leaves their names.
_FINAL = re.compile(r".*(?:<\|channel\|>final.*?<\|message\|>|\A(?:analysis|commentary).*?assistantfinal)", re.DOTALL)
_CHANNEL = re.compile(r"\s*(?:<\|channel\|>(?:analysis|commentary)|(?:analysis|commentary)(?=[A-Z]))")
_AROUND = re.compile(
    r"\A\s*(?:<(answer|response)>|<\|(?:begin_of_solution|start_response|start_text)\|>)"
    r"|(?:</(?:answer|response)>|<\|(?:end_of_solution|end_response|end_text|return|end)\|>)\s*\Z",
    re.IGNORECASE,
)


def answer_of(completion: str) -> str:
    """Return a completion without its thoughts, ``<think>…</think>`` and their like; empty if it is a thought alone.

    A thought may be opened by the prompt, so that only its end stands in the completion. One that is cut short by the
    completion's end holds no answer.
    """
    if final := _FINAL.match(completion):
        answer = completion[final.end() :]
    elif _CHANNEL.match(completion):
        return ""
    else:
        answer = _outside_thoughts(completion)
    return completion if answer == completion else _AROUND.sub("", answer).strip()


def _outside_thoughts(text: str) -> str:
    """Return the text before, between and after thoughts. An end without a beginning ends what the prompt began."""
    pieces, position, opened = [], 0, None
    for bound in _BOUND.finditer(text):
        if bound["end"]:
            pieces = [] if opened is None else pieces
            position, opened = bound.end(), None
        elif opened is None:
            pieces.append(text[position : bound.start()])
            position = opened = bound.start()
    line = text[:position].rpartition("\n")[2]
    if opened is None or line.strip():  # inside a line, a beginning without an end is a word of the answer
        pieces.append(text[position:])
    return "".join(pieces)
