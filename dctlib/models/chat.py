"""Chat format and token ids of prompts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jinja2 import Environment, TemplateError, meta
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Instruction: TypeAlias = str | Sequence[Mapping[str, Any] | tuple[str, str]]
"""One user turn; or a conversation, a list of turns that each have a ``role`` and a ``content``."""

_MARK = "dctlib"  # an ordinary word, which templates leave as it is
_MARK_IN_PYTHON = re.compile(rf"""['"]text['"]\s*:\s*['"]{_MARK}""")
_SET_HERE = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}  # or by transformers
_OF_TRANSFORMERS = {"chat_template", "continue_final_message"}
# What the code of a template raises on a conversation that it was not written for.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad with: the tokenizer's own, its end of text, or token 0. It is always masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def format_chat(
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[Instruction],
    *,
    system: str | None = None,
    **template_arguments: Any,
) -> list[str]:
    """Return each instruction in the model's chat template, up to where the assistant's answer begins.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Its chat template is used.
    instructions : sequence of str or of conversations
        A string is one user turn. A conversation is a list of turns, ``{"role": "user", "content": "Hello"}``. A
        content may be a list of text parts, ``[{"type": "text", "text": "Hello"}]``.
    system : str, optional
        A system message before each. Left out, the template's own default applies.
    **template_arguments
        Passed to the template: ``enable_thinking=False`` for Qwen3. ``chat_template`` names one of several templates.
        With ``continue_final_message=True`` the prompt ends inside the last turn, an answer to continue.

    Raises
    ------
    ValueError
        If `instructions` is empty or a single string or conversation, or one of them is blank, no conversation, or in
        chat format already. If
        the tokenizer has no chat template, or its template refuses or ignores a turn, the system message or an
        argument.
    """
    if isinstance(instructions, str | bytes) or not isinstance(instructions, Sequence) or not instructions:
        raise ValueError(f"got instructions={instructions!r:.200}, expected at least one instruction in a list")
    if isinstance(instructions[0], Mapping):
        raise ValueError(f"got one conversation {instructions!r:.200}, expected at least one instruction in a list")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"got system={system!r:.200}, expected a string")
    conversations = [as_turns(instruction) for instruction in instructions]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this tokenizer has no chat template; it is not a chat model's. Pass plain texts instead")
    _check_arguments(tokenizer, template_arguments)
    ending = _ending_of_prompts(tokenizer)
    texts = [each for each in instructions if isinstance(each, str)]
    if formatted := [text for text in texts if ending and text.rstrip().endswith(ending)]:
        raise ValueError(f"got {formatted[0]!r:.400}, which is in chat format already; pass the instruction alone")
    if system is not None:
        if any(turn["role"] == "system" for turns in conversations for turn in turns):
            raise ValueError(f"got system={system!r:.200} and a conversation with its own; leave `system` out")
        conversations = [[{"role": "system", "content": system}, *turns] for turns in conversations]
    return [
        _render(tokenizer, _in_readable_form(tokenizer, turns, template_arguments), template_arguments)
        for turns in conversations
    ]


def _ending_of_prompts(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the chat template writes behind a user's text; nothing if it refuses a user turn alone."""
    try:
        return _behind_user(_marked_prompt(tokenizer, ["user"]))
    except ValueError:
        return ""


def as_turns(instruction: Instruction) -> list[dict[str, Any]]:
    """Return the turns of one instruction.

    Raises
    ------
    ValueError
        If it is neither a string with text in it nor a list of turns, or a turn holds anything but text.
    """
    if isinstance(instruction, str):
        if not instruction.strip():
            raise ValueError(f"got the instruction {instruction!r}, expected text in it")
        return [{"role": "user", "content": instruction}]
    if isinstance(instruction, bytes) or not isinstance(instruction, Sequence):
        raise ValueError(
            f"got the instruction {instruction!r:.200} of type {type(instruction).__name__}, expected a string or a "
            f"list of turns such as {{'role': 'user', 'content': 'Hi'}}"
        )
    turns: list[Any] = [
        {"role": turn[0], "content": turn[1]} if isinstance(turn, tuple) and len(turn) == 2 else turn
        for turn in instruction
    ]
    if not turns or not all(_is_turn(turn) for turn in turns):
        raise ValueError(
            f"got the conversation {instruction!r:.400}, expected turns such as {{'role': 'user', 'content': 'Hi'}}, "
            f"with text alone"
        )
    return [dict(turn) for turn in turns]


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or not turn["role"].strip():
        return False
    content = turn.get("content")
    if content is None:
        return bool(turn.get("tool_calls"))
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        return bool(content) and all(
            isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        )
    return isinstance(content, str)


def last_user_turn(instruction: Instruction) -> str:
    """Return what the user says last: of a string, itself; of a conversation, the text of its last user turn."""
    if isinstance(instruction, str):
        return instruction
    turns = as_turns(instruction)
    asked = [turn for turn in turns if turn["role"] == "user"] or turns
    content = asked[-1].get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _check_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError on an argument that the template never looks up, because it would do nothing."""
    if not arguments:
        return
    template: Any = tokenizer.get_chat_template(arguments.get("chat_template"), arguments.get("tools"))
    # transformers marks the assistant's tokens by a tag of its own, which jinja2 alone cannot read.
    template = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)
    try:
        known = meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template))
    except TemplateError as error:
        raise ValueError(f"cannot read the tokenizer's chat template: {error}") from error
    if unknown := sorted(set(arguments) - _OF_TRANSFORMERS - (known - _SET_HERE)):
        raise ValueError(
            f"the tokenizer's chat template has no argument {', '.join(unknown)}; it reads "
            f"{', '.join(sorted(known - _SET_HERE)) or 'none'}"
        )


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], arguments: Mapping[str, Any]) -> str:
    header = not arguments.get("continue_final_message")
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=header, **arguments)
    except _TEMPLATE_ERRORS as error:
        system = any(turn["role"] == "system" for turn in turns)
        hint = "; it may take no system message: leave `system` out" if system else ""
        reason = " ".join(str(error).split())
        raise ValueError(f"the tokenizer's chat template refuses the conversation ({reason}){hint}") from error
    return str(text)


def _in_readable_form(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], arguments: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the turns with contents as this template reads them: as strings, or in parts.

    A template of the other form raises, writes nothing, or writes a list as Python does, which marked turns reveal.
    """
    problem = None
    for form in (turns, _in_other_form(turns)):
        try:
            written = _render(tokenizer, [_marked(turn) for turn in form], arguments)
        except ValueError as error:
            problem = problem or error
            continue
        roles = {turn["role"] for turn in form} & {"system", "user"}
        if unread := sorted(role for role in roles if f"{_MARK} {role}" not in written):
            problem = problem or ValueError(f"the tokenizer's chat template ignores the {unread[0]} message")
        elif _MARK_IN_PYTHON.search(written):
            problem = problem or ValueError("the tokenizer's chat template takes no content in parts: pass one string")
        else:
            return form
    assert problem is not None
    raise problem


def _in_other_form(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return strings in parts or, if a content is in parts already, each single part as a string."""
    if all(isinstance(turn.get("content"), str | None) for turn in turns):
        return [turn | {"content": [{"type": "text", "text": turn.get("content") or ""}]} for turn in turns]
    alone = [not isinstance(turn.get("content"), str | None) and len(turn["content"]) == 1 for turn in turns]
    return [
        turn | {"content": turn["content"][0]["text"]} if single else turn
        for turn, single in zip(turns, alone, strict=True)
    ]


def _marked(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn with a mark in place of each text that a system or a user writes."""
    content, mark = turn.get("content"), f"{_MARK} {turn['role']}"
    if turn["role"] not in ("system", "user") or content is None:
        return turn
    return turn | {"content": mark if isinstance(content, str) else [part | {"text": mark} for part in content]}


def _marked_prompt(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> str:
    """Return a prompt with one turn for each role, and a mark in place of each text."""
    return _render(tokenizer, [_marked({"role": role, "content": ""}) for role in roles], {})


def _behind_user(prompt: str) -> str:
    """Return what follows the user's mark in a prompt of :func:`_marked_prompt`."""
    return prompt.rpartition(f"{_MARK} user")[2].strip()


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return the token ids of one text, (1, T), after the start tokens that a plain text needs.

    What :func:`format_chat` rendered is tokenized as it stands, as ``apply_chat_template(tokenize=True)`` does. A plain
    text gets the start tokens that the tokenizer adds, unless it begins with them. End tokens are never added.

    Raises
    ------
    ValueError
        If `text` is no string, or has no tokens.
    """
    if not isinstance(text, str) or not text:
        raise ValueError(f"got the prompt {text!r:.200}, expected a non-empty string")
    own = _ids(tokenizer, text, special=False)
    if not own:
        raise ValueError(f"got the prompt {text!r:.200}, which has no tokens, expected a text with words in it")
    start = _start_tokens(own, _ids(tokenizer, text, special=True))
    if start and not _begins_with(tokenizer, own, start) and not _is_rendered(tokenizer, text, start):
        own = [*start, *own]
    return torch.tensor([own])


def tokenize_each(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tensor]:
    """Return the token ids of every text, (1, T), where T differs between texts.

    Raises
    ------
    ValueError
        If `texts` is empty, a single string, or no list.
    """
    if isinstance(texts, str | bytes | Mapping) or not hasattr(texts, "__len__") or not len(texts):
        raise ValueError(f"got texts={texts!r:.200}, expected at least one prompt in a list")
    return [tokenize(tokenizer, text) for text in texts]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    ids: Any = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def _start_tokens(own: list[int], whole: list[int]) -> list[int]:
    """Return what stands ahead of a text's `own` tokens in the `whole` that the tokenizer makes of it."""
    for first in range(len(whole) - len(own) + 1):
        if whole[first : first + len(own)] == own:
            return whole[:first]
    raise ValueError("this tokenizer splits a text differently when it adds special tokens; set add_bos_token=False")


def _begins_with(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: list[int]) -> bool:
    """Return whether the first token is a start token, apart from white space and padding."""
    for token in ids:
        if token in start:
            return True
        if token != tokenizer.pad_token_id and str(tokenizer.decode([token])).strip():
            return False
    return False


def _is_rendered(tokenizer: PreTrainedTokenizerBase, text: str, start: list[int]) -> bool:
    """Return whether a text without start tokens begins or ends as the chat template's prompts do.

    The text alone decides, so that a prompt may be stored, read and extended in between.
    """
    if not getattr(tokenizer, "chat_template", None):
        return False
    for roles in (["user"], ["system", "user"]):
        try:
            prompt = _marked_prompt(tokenizer, roles)
        except ValueError:
            continue
        if _begins_with(tokenizer, _ids(tokenizer, prompt, special=False), start):
            return False  # all of the template's prompts have them
        before = prompt.partition(f"{_MARK} {roles[0]}")[0].strip()
        after = _behind_user(prompt)
        if (before and text.lstrip().startswith(before)) or (after and text.rstrip().endswith(after)):
            return True
        if not before and not after:
            return True  # the template writes nothing, so that every text could be its prompt
    return False
