"""Chat format and token ids of prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad with: the tokenizer's own, its end of text, or token 0. It is always masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def format_chat(
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str | Sequence[Mapping[str, str]]],
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
        A string is one user turn. A conversation is a list of turns, ``{"role": "user", "content": "Hello"}``.
    system : str, optional
        A system message before each. Left out, the template's own default applies.
    **template_arguments
        Passed to the template: ``enable_thinking=False`` for Qwen3.

    Raises
    ------
    ValueError
        If `instructions` is empty or a single string or conversation, if a turn lacks its role or content, or if the
        tokenizer has no chat template or its template refuses the conversation.
    """
    if isinstance(instructions, str) or not instructions or isinstance(instructions[0], Mapping):
        raise ValueError(f"got instructions={instructions!r}, expected at least one instruction in a list")
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template; it is not a chat model's. Pass plain texts instead")
    options = {**template_arguments, "tokenize": False, "add_generation_prompt": True}
    before = [] if system is None else [{"role": "system", "content": system}]
    conversations = [[*before, *_turns(instruction)] for instruction in instructions]
    try:
        return [str(tokenizer.apply_chat_template(turns, **options)) for turns in conversations]
    except TemplateError as error:
        hint = "" if system is None else "; it may take no system message: leave `system` out"
        raise ValueError(f"the tokenizer's chat template refuses the conversation ({error}){hint}") from error


def _turns(instruction: str | Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the turns of one instruction."""
    if isinstance(instruction, str):
        return [{"role": "user", "content": instruction}]
    if not instruction or not all(
        isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in instruction
    ):
        raise ValueError(
            f"got the conversation {instruction!r}, expected turns such as {{'role': 'user', 'content': 'Hi'}}"
        )
    return [dict(turn) for turn in instruction]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return the token ids of one text, (1, T), with one begin-of-text token where the tokenizer adds one.

    Chat templates often write that token into the text, so it is added only where the text lacks it.
    """
    if not isinstance(text, str) or not text:
        raise ValueError(f"got the prompt {text!r}, expected a non-empty string")
    has_bos = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    inputs: Any = tokenizer(text, return_tensors="pt", add_special_tokens=not has_bos)
    return inputs["input_ids"]


def tokenize_each(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tensor]:
    """Return the token ids of every text, (1, T) each, with T its own.

    Raises
    ------
    ValueError
        If there is no text, or one in place of a list.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"got texts={texts!r}, expected at least one prompt in a list")
    return [tokenize(tokenizer, text) for text in texts]
