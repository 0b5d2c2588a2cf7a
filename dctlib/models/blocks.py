"""The blocks of a model, what passes between them, and the kernels under which they can be differentiated."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def unwrap(model: Any) -> Any:
    """Return the plain transformers model behind a PEFT model, a compiled one, or a wrapper for several devices."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()
        elif type(model).__module__.startswith("peft.") and hasattr(model, "model"):  # a tuner, or several mixed
            model = model.model
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def adds_tokens(model: Any) -> bool:
    """Return whether PEFT puts learned tokens before every prompt of `model`, as prompt and prefix tuning do."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def has_hooks(model: Any) -> bool:
    """Return whether a module of `model` has a forward hook, such as those of :func:`dctlib.steer`."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in unwrap(model).modules())


def get_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the transformer blocks of `model`, in order: block s maps h_s to h_{s+1}.

    They are the outermost list of modules in the text decoder that is as long as the configuration says.

    Raises
    ------
    ValueError
        If `model` is not a decoder-only transformers model, or has no such list.
    """
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"got a {type(model).__name__}, expected a transformers language model, as from load_model")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has an encoder and a decoder, expected a decoder-only language model")
    config = model.config.get_text_config()
    depths = {getattr(config, name, None) for name in ("num_hidden_layers", "decoder_layers")}  # the latter: BART's kin

    def lists_in(module: nn.Module) -> list[tuple[int, nn.ModuleList]]:
        parts = [(path.count("."), part) for path, part in module.named_modules()]
        return [(level, part) for level, part in parts if isinstance(part, nn.ModuleList) and len(part) in depths]

    # A vision-language model also has such a list in its vision encoder. Some models call their output head `decoder`.
    lists = lists_in(model.get_decoder()) or lists_in(model)
    if not lists:
        raise ValueError(
            f"{type(model).__name__} keeps no list of its {config.num_hidden_layers} blocks, so there is no layer to "
            "steer or to fit; docs/families.md says which layouts are covered"
        )
    return min(lists, key=lambda pair: pair[0])[1]


def get_holders(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold the blocks of `model`: itself first, last the one that runs them one by one."""
    plain, blocks = unwrap(model), get_blocks(model)
    parts = next(path for path, part in plain.named_modules() if part is blocks).split(".")
    return [plain.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]


def check_layer(model: nn.Module, layer: int, *, name: str = "layer") -> int:
    """Return `layer` if `model` has a block of that index, else raise ValueError naming the valid range."""
    count = len(get_blocks(model))
    if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer < count:
        raise ValueError(f"got {name}={layer!r}, expected a block index from 0 to {count - 1}")
    return int(layer)


def residual_width(model: nn.Module) -> int:
    """Return d, the number of coordinates of the residual stream."""
    return unwrap(model).config.get_text_config().hidden_size


def split_residual(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """Return the residual stream that a block was called with, and the other positional and keyword arguments."""
    if args:
        return args[0], args[1:], dict(kwargs)
    others = dict(kwargs)
    return others.pop("hidden_states"), (), others


def output_residual(output: Any) -> Tensor:
    """Return the residual stream of what a block returned: a tensor, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run every part of `model` in evaluation mode, then return parts that were in training mode to that."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Run `model` in evaluation mode under eager attention and eager experts, then restore its settings.

    Forward-mode differentiation through scaled_dot_product_attention and grouped matrix products raises. Under eager
    attention every block also receives an explicit mask, which a replay can use again.
    """
    plain: Any = unwrap(model)
    configs = {id(part.config): part.config for part in plain.modules() if isinstance(part, PreTrainedModel)}
    before = [(config, config._attn_implementation, config._experts_implementation) for config in configs.values()]
    try:
        if plain._can_set_attn_implementation():
            plain.set_attn_implementation("eager")
        if plain._can_set_experts_implementation():
            plain.set_experts_implementation("eager")
        with evaluation_mode(plain):
            yield
    finally:
        for config, attention, experts in before:
            config._attn_implementation, config._experts_implementation = attention, experts


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error below which two ways to compute the same activations agree in `dtype`.

    transformers rounds softmax and norms to float32 in a model of any type.
    """
    return {torch.float64: 1e-5, torch.float32: 1e-3}.get(dtype, 0.05)
