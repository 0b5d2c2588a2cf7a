"""A model as a sweep's settings name it: by its folder and by the digest of its weights."""

from functools import lru_cache

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.models import load_model
from dctlib.store import model_digest


def pin(model: str, dtype: str) -> dict[str, str]:
    """The settings ``model``, ``digest`` and ``dtype`` of a task: a model may be trained again under its name."""
    return {"model": model, "digest": model_digest(load_model(model, dtype=dtype)[0]), "dtype": dtype}


@lru_cache(maxsize=1)
def open_pinned(model: str, digest: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What :func:`pin` named. The last one stays open for the tasks that follow.

    Raises
    ------
    ValueError
        If the model is not the one with that digest.
    """
    opened, tokenizer = load_model(model, dtype=dtype)
    if (found := model_digest(opened)) != digest:
        raise ValueError(f"{model} has digest {found[:12]}…, expected {digest[:12]}…: was it trained again?")
    return opened, tokenizer
