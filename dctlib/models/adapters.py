"""PEFT adapters, merged into the model that they were trained on."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from dctlib.models.blocks import tolerance
from dctlib.models.plain_copy import untie
from dctlib.models.sources import Source
from dctlib.models.trace import probe_tokens

_CONFIG = "adapter_config.json"

_WEIGHTS = "adapter_model.safetensors"

# Where peft puts an embedding if the adapter holds its whole weight.
_WRAPPERS = r"modules_to_save\.|base_layer\.|token_adapter\.base_layer\."


def read_base(source: Source) -> str | None:
    """Return the name of the model that the adapter at `source` belongs to, or None if no adapter is there.

    Raises
    ------
    ValueError
        If peft is missing, the adapter cannot be merged or is pickled, or a whole model lies beside it.
    """
    if _CONFIG not in source.files:
        return None
    if source.has(r"(model|pytorch_model).*\.(safetensors|bin)"):
        raise ValueError(f"{source.location} holds a whole model and an adapter; move one of them to another folder")
    if _WEIGHTS not in source.files:
        raise ValueError(f"{source.location} has no {_WEIGHTS}, the only format read of an adapter's weights")
    try:
        config = json.loads(source.fetch(_CONFIG).read_text(encoding="utf-8"))
        base, kind = config["base_model_name_or_path"], config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{_CONFIG} of {source.location} is damaged: {error!r}") from error
    if not base:
        raise ValueError(f"{_CONFIG} of {source.location} names no model: fill in its base_model_name_or_path")
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PromptLearningConfig
    except ImportError as error:
        raise ValueError(f"{source.location} is a PEFT adapter, which needs peft: pip install peft") from error
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"{source.location} is an adapter of type {kind!r}, which the installed peft lacks; update peft"
        )
    if issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], PromptLearningConfig) or kind == "ADAPTION_PROMPT":
        raise ValueError(
            f"{source.location} is an adapter of the type {kind}: it adds tokens and changes no weights, so it cannot "
            f"be merged into {base}. Pass the model alone, or an adapter such as LoRA"
        )
    revision = config.get("revision")
    return f"{base}@{revision}" if revision and not Path(base).exists() else str(base)


def merge_adapter(model: PreTrainedModel, source: Source) -> PreTrainedModel:
    """Return `model` with the adapter at `source` merged into its weights, as a plain model again.

    Raises
    ------
    ValueError
        If the adapter does not fit the model, or the merged model does not give what model and adapter give.
    """
    import peft

    name, kind = source.location, type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{name} belongs to a quantised model, into whose weights nothing merges exactly; name the unquantised "
            f"model in its {_CONFIG}"
        )
    folder, weights = str(source.fetch(_CONFIG).parent), source.fetch(_WEIGHTS)
    try:
        changed = _resize_embeddings(model, weights)
        with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=[]):
            config = peft.PeftConfig.from_pretrained(folder)
            config.inference_mode = True
            adapted = peft.PeftModel(model, config).eval()
            report = adapted.load_adapter(folder, "default")
        homeless = [name for name in report.unexpected_keys if not any(f".{path}." in name for path in changed)]
        if report.missing_keys or homeless:
            raise ValueError(f"missing {report.missing_keys[:3]}, without a place {homeless[:3]}")
        expected = _probe(adapted, model)
        if len(changed) == 1 and untie(adapted):  # the adapter changes one of two tied embeddings alone
            model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
        merged: Any = adapted.merge_and_unload()
    except Exception as error:  # whatever peft raises about modules and shapes of another model
        raise ValueError(f"the adapter {name} does not fit {kind}, or cannot be merged into it: {error}") from error
    if not (_probe(merged, merged) - expected).norm() <= tolerance(merged.dtype) * expected.norm():
        raise ValueError(f"merged into {kind}, the adapter {name} gives other logits than beside it")
    return merged


def _probe(run: Any, model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return run(input_ids=probe_tokens(model), use_cache=False).logits.double()


def _resize_embeddings(model: PreTrainedModel, weights: Path) -> list[str]:
    """Give the embeddings the rows that the adapter brings, and return the paths of those that it changes."""
    paths = {module: path for path, module in model.named_modules()}
    parts: list[Any] = [
        part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None
    ]
    with safe_open(weights, "pt") as file:
        names: list[str] = list(file.keys())
        shapes = {name: file.get_slice(name).get_shape() for name in names}
    whole = [re.compile(rf".*\.{re.escape(paths[part])}\.({_WRAPPERS})?weight") for part in parts]
    rows = [{shape[0] for name, shape in shapes.items() if pattern.fullmatch(name)} for pattern in whole]
    if any(count - {part.weight.shape[0]} for part, count in zip(parts, rows, strict=True)):
        if parts[0].weight is not parts[-1].weight and not all(rows):
            raise ValueError("it was trained with another vocabulary, and brings one of two embeddings alone")
        model.resize_token_embeddings(max(set.union(*rows)), mean_resizing=False)
    own = [name for name in names if ".token_adapter." not in name]  # there, peft changes tied embeddings alike
    return [paths[part] for part in parts if any(f".{paths[part]}." in name for name in own)]
