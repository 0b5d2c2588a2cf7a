"""Chat format and token ids of prompts."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with: the tokenizer's own, else its end of text, else the first there is. It is always masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def format_chat(
    tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], *, system: str | None = None
) -> list[str]:
    """Wrap each instruction in the model's chat template, up to where the assistant's answer begins.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Its chat template is used.
    instructions : sequence of str
        One user turn each.
    system : str, optional
        A system message; left out, the template's own default applies.

    Raises
    ------
    ValueError
        If `instructions` is empty or a single string, or the tokenizer has no chat template, or one that takes no
        system message.
    """
    if isinstance(instructions, str) or not instructions:
        raise ValueError(f"got instructions={instructions!r}, expected at least one instruction in a list")
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template; it is not a chat model's. Pass plain texts instead")
    before = [] if system is None else [{"role": "system", "content": system}]
    conversations = [[*before, {"role": "user", "content": instruction}] for instruction in instructions]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    try:
        return [str(tokenizer.apply_chat_template(turns, **options)) for turns in conversations]
    except TemplateError as error:
        hint = "" if system is None else "; it may take no system message: leave `system` out"
        raise ValueError(f"the tokenizer's chat template refuses the conversation ({error}){hint}") from error


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of one text, (1, T). A begin-of-text token is added unless the text already starts with it."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"got the prompt {text!r}, expected a non-empty string")
    inputs: Any = tokenizer(text, return_tensors="pt", add_special_tokens=not has_bos(tokenizer, text))
    return inputs["input_ids"]


def tokenize_each(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tensor]:
    """Token ids of every text, (1, T) each, with T its own.

    Raises
    ------
    ValueError
        If there is no text, or one in place of a list.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"got texts={texts!r}, expected at least one prompt in a list")
    return [tokenize(tokenizer, text) for text in texts]


def has_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether `text` starts with the begin-of-text token, as chat templates often write it."""
    return bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
