"""Digests that identify a model and its tokenizer in the keys of results."""

import hashlib
import json
from functools import lru_cache
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.models.assets import ASSETS, CONVERSION, MODELS
from dctlib.models.loading import load_model


def model_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's configuration and parameters: equal only if the models compute the same."""
    digest = hashlib.sha256(repr(model).encode())
    if config := getattr(model, "config", None):
        settings = {k: v for k, v in config.to_dict().items() if k[0] != "_" and k != "transformers_version"}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, _ in model.named_parameters():
        digest.update(name.encode())
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        with align_module_device(module):  # a weight that is offloaded is fetched
            digest.update(getattr(module, leaf).detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def chat_model_digest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of a model's digest and of everything that turns a conversation into token ids."""
    fast: Any = tokenizer
    backend: Any = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        last_call = {"padding": None, "truncation": None}  # what its last call left in it
        backend = json.loads(fast.backend_tokenizer.to_str()) | last_call
    parts = [model_digest(model), backend, fast.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def model_key(model: str, dtype: str) -> dict[str, Any]:
    """Return what identifies a model in a record on every machine, with no weights loaded if its name is pinned.

    Parameters
    ----------
    model : str
        As for :func:`dctlib.load_model`.
    dtype : str
        ``"bfloat16"``, ``"float32"`` or ``"float64"``.

    Returns
    -------
    dict
        ``model``, ``sha256`` of the pinned file, ``conversion`` (its version) and ``dtype``. For any other model the
        dict of :func:`fingerprint_model`.

    Raises
    ------
    ValueError
        If `dtype` is ``"native"``, because that means another type on another machine.
    """
    if dtype == "native":
        raise ValueError("got dtype 'native', expected 'bfloat16' or 'float32': a record names what it was measured in")
    if model not in MODELS:
        return fingerprint_model(model, dtype)
    return {"model": model, "sha256": ASSETS[MODELS[model].asset].sha256, "conversion": CONVERSION, "dtype": dtype}


def fingerprint_model(model: str, dtype: str) -> dict[str, str]:
    """Return a task's settings ``model``, ``digest`` and ``dtype``, because a name may be given to other weights."""
    digest = _pinned_digest(model) or chat_model_digest(*load_model(model, dtype=dtype))
    return {"model": model, "digest": digest, "dtype": dtype}


def _pinned_digest(model: str) -> str | None:
    """Return the digest of a pinned name, of which every load is checked already."""
    return f"{ASSETS[MODELS[model].asset].sha256}-{CONVERSION}" if model in MODELS else None


@lru_cache(maxsize=1)
def load_fingerprinted(model: str, digest: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and tokenizer that :func:`fingerprint_model` identified; the last ones stay loaded for reuse.

    Raises
    ------
    ValueError
        If the model is not the one with that digest.
    """
    loaded = load_model(model, dtype=dtype)
    if (found := _pinned_digest(model) or chat_model_digest(*loaded)) != digest:
        raise ValueError(f"{model} has digest {found[:12]}…, expected {digest[:12]}…: was it trained again?")
    return loaded
