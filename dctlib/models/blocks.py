"""Parts of a model: its blocks, norms, and the modules that write to the residual stream, for each known family."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

# Where each family keeps its list of blocks and the norm behind the last one.
_BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.language_model.layers")

_FINAL_NORMS = ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm", "model.language_model.norm")


def unwrap(model: Any) -> Any:
    """Return the plain transformers model behind a PEFT model, a compiled one, or a wrapper for several devices."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def get_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the transformer blocks of `model`, in order: block s maps h_s to h_{s+1}."""
    return _first_part(model, *_BLOCKS, kind=nn.ModuleList)


def get_final_norm(model: nn.Module) -> nn.Module:
    """Return the norm between the last block and the unembedding."""
    return _first_part(model, *_FINAL_NORMS)


def _first_part(module: nn.Module, *paths: str, kind: type = nn.Module) -> Any:
    """Return the submodule at the first of `paths` that exists."""
    for path in paths:
        try:
            part = module.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(part, kind):
            return part
    raise ValueError(
        f"{type(module).__name__} has none of {', '.join(paths)}; add its layout to dctlib/models/blocks.py"
    )


@dataclass(frozen=True)
class ResidualWriters:
    """Modules whose outputs are added to the residual stream, and the weights that they write with.

    Attributes
    ----------
    modules : list of nn.Module
        Embeddings first, then for each block its attention and its MLP, or the norms behind them.
    embeddings : list
        Token embeddings, and learned positions where the family has them.
    projections : list or None
        Output projections of attention and MLP, ``nn.Linear`` or GPT-2's transposed ``Conv1D``. None for a family
        with a norm behind them, because no edit of a weight projects that norm's output.
    """

    modules: list[nn.Module]
    embeddings: list[Any]
    projections: list[Any] | None


def residual_writers(model: PreTrainedModel) -> ResidualWriters:
    """Return every module that writes to the residual stream of `model`."""
    positions = getattr(model.base_model, "wpe", None)
    embeddings: list[Any] = [model.get_input_embeddings()] + ([] if positions is None else [positions])
    modules, projections, normed = [*embeddings], [], False
    for block in get_blocks(model):
        attention = _first_part(block, "self_attn", "attention", "attn")
        mlp = _first_part(block, "mlp")
        if hasattr(block, "post_feedforward_layernorm"):  # Gemma 2 and 3, OLMo 2
            normed = True
            modules += [block.post_attention_layernorm, block.post_feedforward_layernorm]
        else:
            modules += [attention, mlp]
            projections.append(_first_part(attention, "o_proj", "dense", "c_proj"))
            projections.append(_first_part(mlp, "down_proj", "dense_4h_to_h", "c_proj"))
    return ResidualWriters(modules, embeddings, None if normed else projections)


# Families tested for it: tokens meet in attention alone, under any mask and positions.
_PACKED_FAMILIES = ["gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"]


def supports_packing(model: PreTrainedModel, tokens: int) -> bool:
    """Return whether prompts of at most `tokens` tokens may run as one tree (:mod:`dctlib.models.packing`)."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return config.model_type in _PACKED_FAMILIES and (window is None or tokens <= window)


def residual_width(model: PreTrainedModel) -> int:
    """Return d, the number of coordinates of the residual stream."""
    return model.config.get_text_config().hidden_size


def check_layer(model: nn.Module, layer: int, *, name: str = "layer") -> int:
    """Return `layer` if `model` has a block of that index, else raise ValueError naming the valid range."""
    count = len(get_blocks(model))
    if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer < count:
        raise ValueError(f"got {name}={layer!r}, expected a block index from 0 to {count - 1}")
    return int(layer)


def compute_logits(model: PreTrainedModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return the logits of a few tokens at residuals behind the last block.

    Parameters
    ----------
    hidden : Tensor, (..., d)
        Output of the last block, before the final norm.
    tokens : Tensor, (k,)
        Vocabulary indices.

    Returns
    -------
    Tensor, (..., k)
        Float32 and equal to the model's own logits: the family's soft cap or scale is applied.

    Raises
    ------
    ValueError
        If a logit is not finite.
    """
    head: Any = model.get_output_embeddings()
    hidden = get_final_norm(model)(hidden)
    with align_module_device(head):  # its weight is used without calling it, which would fetch an offloaded one
        rows = tokens.to(head.weight.device)
        weight = head.weight[rows].to(hidden.device)
        bias = getattr(head, "bias", None)
        bias = None if bias is None else bias[rows].to(hidden.device)
    return check_finite(postprocess_logits(model, nn.functional.linear(hidden, weight, bias)))


def postprocess_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """Return the output head's `logits` in float32, with the family's soft cap or scale: the model's own logits."""
    config = model.config.get_text_config()
    logits = logits.float()
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits * (getattr(config, "logit_scale", None) or 1.0)


def check_finite(logits: Tensor) -> Tensor:
    """Return `logits`, or raise ValueError if one is NaN or infinite, because rankings put it before every number."""
    if not torch.isfinite(logits).all():
        raise ValueError(
            "the model gave logits that are not finite: are its weights damaged, or does a block overflow? Try "
            "dtype='float32', or shorter vectors"
        )
    return logits


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` in evaluation mode under eager attention, then put both back.

    Forward-mode differentiation through scaled_dot_product_attention raises. Under eager attention every block also
    receives an explicit mask, which a replay can use again.
    """
    training = [module for module in model.modules() if module.training]
    implementation: Any = model.config._attn_implementation
    try:
        model.eval()
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(implementation)
        for module in training:
            module.training = True
