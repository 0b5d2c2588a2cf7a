"""Weights of causal language models: which checkpoints hold one, and whether it was loaded whole."""

from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.quantizers.auto import AutoHfQuantizer

from dctlib.models.gguf import check_gguf, load_gguf
from dctlib.models.sources import Source

# What generates text from text and more: the classes of vision-language models.
_MULTIMODAL = [
    getattr(transformers, name)
    for name in ("AutoModelForMultimodalLM", "AutoModelForImageTextToText")
    if hasattr(transformers, name)
]

# How transformers names classes that share the blocks of a causal language model, and not its head.
_OTHER_HEADS = ("Classification", "MaskedLM", "MultipleChoice", "QuestionAnswering", "Regression", "RewardModel")


def check_checkpoint(source: Source) -> PreTrainedConfig:
    """Return the configuration of a checkpoint that holds a causal language model.

    Raises
    ------
    ValueError
        If it holds another kind of model, needs code of its own or a package that is not installed, or is pickled.
    """
    if source.gguf:
        return check_gguf(source.gguf)
    name = source.location
    if not source.has(r".*\.safetensors(\.index\.json)?"):
        raise ValueError(f"cannot load the weights of {name!r} from safetensors, the only format read: none is there")
    try:
        config = AutoConfig.from_pretrained(name, **source.options)
    except Exception as error:  # other libraries raise many kinds
        reason = str(error).strip().partition("\n")[0]
        hint = "code in a repository is never run" if "custom code" in reason else "it may be too new, or damaged"
        raise ValueError(f"transformers has no architecture for {name!r} ({reason}): {hint}") from error
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ValueError(f"{name!r} ({kind}) has an encoder and a decoder, expected a decoder-only language model")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ValueError(f"{name!r} ({kind}) is an encoder: its tokens see those behind them. Pass a causal model")
    if _auto_class(config) is None:
        raise ValueError(f"{name!r} ({kind}) generates no text, expected a causal language model")
    for saved in config.architectures or ():
        if saved.endswith(_OTHER_HEADS):
            raise ValueError(f"{name!r} was saved as {saved}, whose head gives no tokens; pass a causal language model")
    if settings := _quantisation(config):
        method = settings.get("quant_method")
        if not (method or "load_in_4bit" in settings) or not AutoHfQuantizer.supports_quant_method(settings):
            raise ValueError(f"{name!r} is quantised by {method or 'unnamed means'}, which transformers does not read")
    return config


def load_weights(
    source: Source, config: PreTrainedConfig, *, device: torch.device, dtype: torch.dtype | None, spread: bool
) -> PreTrainedModel:
    """Return the model of a checkpoint on `device`, or spread over all devices, with every weight from its files.

    Parameters
    ----------
    config : PreTrainedConfig
        What :func:`check_checkpoint` returned.
    dtype : torch.dtype or None
        None for a quantised model keeps the type that it was saved in.

    Raises
    ------
    ValueError
        If weights are missing, of other shapes or damaged, or if their quantisation cannot be loaded here.
    """
    options: dict[str, Any] = {"device_map": "auto"} if spread else {}
    model: Any
    if source.gguf:
        model, report = load_gguf(source.gguf, config, dtype=dtype or torch.float32, **options)
    else:
        if _quantisation(config) and not spread and device.type != "cpu":
            options["device_map"] = {"": device}  # quantised weights may not move afterwards
        options |= {"config": config, "dtype": dtype or "auto", "use_safetensors": True, **source.options}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # _check_complete refuses them
        try:
            model, report = _auto_class(config).from_pretrained(source.location, **options)
        except Exception as error:  # from safetensors, the system, quantisers or CUDA
            reason = " ".join(str(error).split())
            hint = f"; pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
            raise ValueError(f"cannot load the weights of {source.location!r}: {reason}{hint}") from error
    _check_complete(source, model, report)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' kernel that rounds again and has no gradient
            module.support_avx512bf16_for_cpu = False
    if spread or getattr(model, "hf_quantizer", None) is not None:
        return model
    if _quantisation(config) and dtype:  # without its kernels it was dequantised, to another type
        for weight in model.parameters():
            weight.data = weight.data.to(dtype)
    return model.to(device)


def _quantisation(config: PreTrainedConfig) -> Any:
    """Return the settings of a checkpoint's quantisation, or None."""
    return getattr(config, "quantization_config", None)


def _auto_class(config: PreTrainedConfig) -> Any:
    """Return the auto class that loads a configuration as a language model, or None if none does."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return next((auto for auto in _MULTIMODAL if type(config) in auto._model_mapping), None)


def _check_complete(source: Source, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raise ValueError if weights were initialised at random, or left out of a part that could hold them.

    Weights of whole parts that the model lacks, such as an image encoder, may be left out.
    """
    faults = {
        "missing": sorted(report["missing_keys"]),
        "of another shape": sorted(key for key, *_ in report["mismatched_keys"]),
        "without a place in the configuration": sorted(filter(partial(_belongs, model), report["unexpected_keys"])),
    }
    found = [f"{len(keys)} {fault} ({', '.join(keys[:3])})" for fault, keys in faults.items() if keys]
    if found:
        raise ValueError(
            f"the weights of {source.location!r} are not those of {type(model).__name__}: {'; '.join(found)}; "
            "pass a whole language model, with the config.json that it was saved with"
        )


def _belongs(model: PreTrainedModel, key: str) -> bool:
    """Return whether a weight that was not loaded names a module of the model, or a further one of a list."""
    if getattr(model, "hf_quantizer", None) is not None:
        return False  # scales that its kernels do not use
    module: Any = model
    for name in key.split("."):
        last, module = module, module._modules.get(name)
        if module is None:
            return isinstance(last, nn.ModuleList) or not last._modules
    return False
