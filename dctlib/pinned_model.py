"""A model as a sweep's settings name it: by its folder and by a digest of what is in it."""

import hashlib
import json
from functools import lru_cache
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.models import load_model, model_digest


def pin(model: str, dtype: str) -> dict[str, str]:
    """The settings ``model``, ``digest`` and ``dtype`` of a task: a model may be trained again under its name."""
    return {"model": model, "digest": whole_digest(*load_model(model, dtype=dtype)), "dtype": dtype}


def whole_digest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of :func:`dctlib.models.model_digest`, and of what the tokenizer makes of a text or a conversation."""
    spoken: Any = tokenizer
    backend: Any = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        backend = json.loads(spoken.backend_tokenizer.to_str()) | {
            "padding": None,
            "truncation": None,
        }  # of its last call
    told = [model_digest(model), backend, spoken.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(repr(told).encode()).hexdigest()


@lru_cache(maxsize=1)
def open_pinned(model: str, digest: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What :func:`pin` named. The last one stays open for the tasks that follow.

    Raises
    ------
    ValueError
        If the model is not the one with that digest.
    """
    opened, tokenizer = load_model(model, dtype=dtype)
    if (found := whole_digest(opened, tokenizer)) != digest:
        raise ValueError(f"{model} has digest {found[:12]}…, expected {digest[:12]}…: was it trained again?")
    return opened, tokenizer
