"""A copy of a model as plain weights: adapters merged, tied weights apart, nothing compiled."""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dctlib.models.blocks import unwrap


def plain_copy(model: Any) -> PreTrainedModel:
    """Return a copy of the transformers model behind `model`, with its active adapters merged into its weights.

    Adapters that are switched off are left out. No two modules of the copy share a weight, so each can be edited.

    Raises
    ------
    ValueError
        If an adapter cannot be merged, such as one that adds tokens to the prompt.
    """
    copied = copy.deepcopy(unwrap(model))
    tied = untie(copied)
    for path, module in reversed(list(copied.named_modules())):  # inner ones first
        vars(module).pop("_compiled_call", None)  # bound to the original, as is a compiled forward
        if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            del module.forward
        if hasattr(module, "_orig_mod"):
            _replace(copied, path, module._orig_mod)
    if has_adapters(copied):
        _merge_adapters(copied)
    if tied:
        copied.config.get_text_config().tie_word_embeddings = copied.config.tie_word_embeddings = False
    return copied


def has_adapters(model: nn.Module) -> bool:
    """Return whether PEFT has put modules of its own into `model`."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def untie(model: nn.Module) -> bool:
    """Give every module weights of its own, and return whether some were shared."""
    seen: set[int] = set()
    tied = False
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
                tied = True
            seen.add(id(parameter))
    return tied


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _merge_adapters(model: Any) -> None:
    """Replace every module that PEFT wraps by one that computes the same with the adapters in its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    done: list[str] = []
    for path, module in list(model.named_modules()):
        if any(path.startswith(f"{outer}.") for outer in done):
            continue
        try:
            if isinstance(module, AuxiliaryTrainingWrapper):
                merged = _unwrapped(module)
            elif isinstance(module, BaseTunerLayer):
                merged = _merged(module)
            else:
                continue
        except Exception as error:  # each tuner has its own
            raise ValueError(f"the {type(module).__name__} at {path} cannot be merged into weights: {error}") from error
        _replace(model, path, merged)
        done.append(path)
    if left := next((type(module) for module in model.modules() if type(module).__module__.startswith("peft.")), None):
        raise ValueError(f"a {left.__name__} of PEFT has no weights to be merged into; use ablate() on the model")
    model._hf_peft_config_loaded = False
    vars(model).pop("peft_config", None)


def _merged(layer: Any) -> nn.Module:
    """Return the innermost layer, with the weights that `layer` computes with."""
    inner = layer.base_layer
    if hasattr(inner, "base_layer"):  # several tuners, one around the other
        layer.base_layer = _merged(inner)
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    elif not layer.disable_adapters and not layer.merged:
        layer.merge(safe_merge=True)
    return layer.base_layer


def _unwrapped(wrapper: Any) -> nn.Module:
    """Return the module that `wrapper` runs: the original, or its trained replacement."""
    if wrapper.disable_adapters or not wrapper.active_adapters:
        chosen = wrapper.original_module
    else:
        chosen = wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    return _merged(chosen) if hasattr(chosen, "base_layer") else chosen
