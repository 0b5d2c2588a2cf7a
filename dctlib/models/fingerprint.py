"""Digests of a model and its tokenizer, which name a model in remembered results."""

import hashlib
import json
from functools import lru_cache
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.models.loading import load_model


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model's configuration and parameters: two models share it only if they compute the same thing."""
    digest = hashlib.sha256(repr(model).encode())
    if config := getattr(model, "config", None):
        told = {k: v for k, v in config.to_dict().items() if k[0] != "_" and k != "transformers_version"}
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, _ in model.named_parameters():
        digest.update(name.encode())
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        with align_module_device(module):  # a weight that is offloaded is fetched
            digest.update(getattr(module, leaf).detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_model(model: str, dtype: str) -> dict[str, str]:
    """The settings ``model``, ``digest`` and ``dtype`` of a task: a model may be trained again under its name."""
    return {"model": model, "digest": chat_model_digest(*load_model(model, dtype=dtype)), "dtype": dtype}


def chat_model_digest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of :func:`dctlib.models.fingerprint.model_digest`, and of what the tokenizer makes of a text or a conversation."""
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
def load_fingerprinted(model: str, digest: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What :func:`fingerprint_model` named. The last one stays open for the tasks that follow.

    Raises
    ------
    ValueError
        If the model is not the one with that digest.
    """
    opened, tokenizer = load_model(model, dtype=dtype)
    if (found := chat_model_digest(opened, tokenizer)) != digest:
        raise ValueError(f"{model} has digest {found[:12]}…, expected {digest[:12]}…: was it trained again?")
    return opened, tokenizer
