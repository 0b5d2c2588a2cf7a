"""Digests that identify a model and its tokenizer in the keys of results."""

import hashlib
import json
import re
from functools import lru_cache
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.models.assets import ASSETS, CONVERSION, MODELS
from dctlib.models.blocks import unwrap
from dctlib.models.loading import load_model

# What decides whether an adapter of peft takes part, besides its weights.
ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


def model_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's configuration, weights and buffers: equal only if the models compute the same.

    Scales of quantised weights and the state of peft's adapters are included. Hooks are not.
    """
    model = unwrap(model)
    digest = hashlib.sha256(repr(model).encode())
    if config := getattr(model, "config", None):
        digest.update(json.dumps(_settings(config.to_dict()), sort_keys=True, default=str).encode())
    for path, module in model.named_modules():
        if hasattr(module, "disable_adapters"):
            digest.update(repr([getattr(module, name, None) for name in ADAPTER_STATE]).encode())
        with align_module_device(module):  # a weight that is offloaded is fetched
            for name, value in sorted(_state(module).items()):
                digest.update(f"{path}.{name}".encode())
                _update(digest, value)
    return digest.hexdigest()


def _state(module: nn.Module) -> dict[str, Any]:
    """Return a module's own weights, the scales that a quantised module saves with them, and all of its buffers."""
    state: dict[str, Any] = {name: value for name, value in module._parameters.items() if value is not None}
    scales: list[Any] = [getattr(weight, "quant_state", None) for weight in state.values()]
    if packed := [each for each in scales if getattr(each, "packing_format_for_cpu", False)]:
        state["scales"] = [each.as_dict(packed=True) for each in packed]  # saving would break bitsandbytes' packed ones
    else:
        module._save_to_state_dict(state, "", keep_vars=False)
    return state | {name: value for name, value in module._buffers.items() if value is not None}


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration, and those nested in it, without where it came from."""
    own = {name: value for name, value in config.items() if not re.match("_|transformers_version", str(name))}
    return {name: _settings(value) if isinstance(value, dict) else value for name, value in own.items()}


def _update(digest: Any, value: Any) -> None:
    """Add a tensor's type, shape and bytes to `digest`; for a tensor made of several, those of each."""
    if isinstance(value, (tuple, list, dict)):
        for part in value.items() if isinstance(value, dict) else value:
            _update(digest, part)
        return
    if not isinstance(value, Tensor):
        digest.update(repr(value).encode())
        return
    value = value.detach()
    digest.update(f"{type(value).__name__}{(value.dtype, tuple(value.shape))}".encode())
    if is_traceable_wrapper_subclass(value):
        names, settings = value.__tensor_flatten__()
        digest.update(repr(settings).encode())
        for name in names:
            _update(digest, getattr(value, name))
    elif value.is_quantized:
        digest.update(repr(value.qscheme()).encode())
        per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
        scales = (value.q_per_channel_scales(), value.q_per_channel_zero_points()) if per_channel else ()
        _update(digest, (value.int_repr(), *(scales or (value.q_scale(), value.q_zero_point()))))
    else:
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def chat_model_digest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of a model's digest, of all that turns a conversation into tokens, and of its end tokens."""
    fast: Any = tokenizer
    backend: Any = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        last_call = {"padding": None, "truncation": None}  # what its last call left in it
        backend = json.loads(fast.backend_tokenizer.to_str()) | last_call
    ends = getattr(model.generation_config, "eos_token_id", None)
    parts = [model_digest(model), backend, fast.chat_template, tokenizer.special_tokens_map, ends]
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
    """Return the digest of a pinned model, whose loading already checks it, or None for another name."""
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
