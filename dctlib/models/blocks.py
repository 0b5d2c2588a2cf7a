"""The parts of a model that the library names: blocks, norms, the modules that write to the residual stream. The only room that knows model families."""

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


def get_blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of `model`, in order: block s maps h_s to h_{s+1}."""
    return _part(model, _BLOCKS, nn.ModuleList)


def get_final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the unembedding."""
    return _part(model, _FINAL_NORMS, nn.Module)


def _part(model: nn.Module, paths: tuple[str, ...], kind: type) -> Any:
    for path in paths:
        try:
            part = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(part, kind):
            return part
    raise ValueError(
        f"{type(model).__name__} keeps none of {', '.join(paths)}; add its layout to dctlib/models/blocks.py"
    )


@dataclass(frozen=True)
class ResidualWriters:
    """What adds to the residual stream: modules whose outputs are added, and the weights that they write with.

    Attributes
    ----------
    modules : list of nn.Module
        Embeddings first, then for each block its attention and its MLP, or the norms behind them.
    embeddings : list
        Token embeddings, and learned positions where the family has them.
    projections : list or None
        Output projections of attention and MLP, ``nn.Linear`` or GPT-2's transposed ``Conv1D``. None for a family
        with a norm behind them: no edit of a weight gives what a projection of that norm's output does.
    """

    modules: list[nn.Module]
    embeddings: list[Any]
    projections: list[Any] | None


def residual_writers(model: PreTrainedModel) -> ResidualWriters:
    """Everything that writes to the residual stream of `model`."""
    embedding: Any = model.get_input_embeddings()
    positions = getattr(model.base_model, "wpe", None)
    embeddings = [embedding] if positions is None else [embedding, positions]
    modules, projections, normed = [*embeddings], [], False
    for block in get_blocks(model):
        attention = _child(block, "self_attn", "attention", "attn")
        mlp = _child(block, "mlp")
        if hasattr(block, "post_feedforward_layernorm"):  # Gemma 2 and 3, OLMo 2
            normed = True
            modules += [_child(block, "post_attention_layernorm"), _child(block, "post_feedforward_layernorm")]
        else:
            modules += [attention, mlp]
            projections.append(_child(attention, "o_proj", "dense", "c_proj"))
            projections.append(_child(mlp, "down_proj", "dense_4h_to_h", "c_proj"))
    return ResidualWriters(modules, embeddings, None if normed else projections)


def _child(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        if isinstance(found := getattr(module, name, None), nn.Module):
            return found
    raise ValueError(
        f"{type(module).__name__} has none of {', '.join(names)}; add its layout to dctlib/models/blocks.py"
    )


# Families whose positions meet in attention alone, under whatever mask and positions they are given.
_BRANCHING = ["gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"]


def supports_packing(model: PreTrainedModel, tokens: int) -> bool:
    """Whether prompts of at most `tokens` tokens may run as one tree (:mod:`dctlib.models.packing`)."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return config.model_type in _BRANCHING and (window is None or tokens <= window)


def residual_width(model: PreTrainedModel) -> int:
    """The number of residual-stream coordinates, d."""
    return model.config.get_text_config().hidden_size


def check_layer(model: nn.Module, layer: int, *, name: str = "layer") -> int:
    """Return `layer` if `model` has a block of that index, else raise ValueError naming the valid range."""
    count = len(get_blocks(model))
    if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer < count:
        raise ValueError(f"got {name}={layer!r}, expected a block index from 0 to {count - 1} (the model has {count})")
    return int(layer)


def compute_logits(model: PreTrainedModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Logits of a few tokens at residuals behind the last block.

    Parameters
    ----------
    hidden : Tensor, (..., d)
        Output of the last block, before the final norm.
    tokens : Tensor, (k,)
        Vocabulary indices.

    Returns
    -------
    Tensor, (..., k)
        Float32, with the family's soft cap or scale applied, so equal to the model's own logits.

    Raises
    ------
    ValueError
        If one is not finite.
    """
    head: Any = model.get_output_embeddings()
    hidden = get_final_norm(model)(hidden)
    with align_module_device(head):  # its weight is used without calling it, which would fetch an offloaded one
        rows, bias = tokens.to(head.weight.device), getattr(head, "bias", None)
        weight = head.weight[rows].to(hidden.device)
        bias = None if bias is None else bias[rows].to(hidden.device)
    return check_finite(postprocess_logits(model, nn.functional.linear(hidden, weight, bias)))


def postprocess_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """What the output head gives, in float32 and with the family's soft cap or scale: the model's own logits."""
    config, logits = model.config.get_text_config(), logits.float()
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits * (getattr(config, "logit_scale", None) or 1.0)


def check_finite(logits: Tensor) -> Tensor:
    """Return `logits`, or raise ValueError if one is NaN or infinite: it would be ranked before every number."""
    if not torch.isfinite(logits).all():
        raise ValueError(
            "the model gave logits that are not finite: are its weights damaged, or does a block overflow? Try "
            "dtype='float32', or shorter vectors"
        )
    return logits


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` in evaluation mode under eager attention, then put both back.

    Eager attention, because forward-mode differentiation through scaled_dot_product_attention raises, and because
    under it every block receives an explicit mask, which a replay can use again.
    """
    training = [module for module in model.modules() if module.training]
    attention: Any = model.config._attn_implementation
    try:
        model.eval()
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(attention)
        for module in training:
            module.training = True
