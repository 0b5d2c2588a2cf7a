"""Models in GGUF files, dequantised by transformers. What transformers would leave unread is found and refused."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_WAY_OUT = "load the folder that the file was converted from"

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")

# A setting of the file and its names in transformers. The configuration must hold the same value.
_NAMES = {
    "attention.head_count": ("num_attention_heads", "n_head", "num_heads"),
    "attention.layer_norm_epsilon": _EPSILONS,
    "attention.layer_norm_rms_epsilon": _EPSILONS,
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "expert_used_count": ("num_experts_per_tok",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "full_attention_interval": ("full_attention_interval",),
    "rope.freq_base": ("rope_theta",),
    "rope.freq_base_swa": ("rope_theta",),
    "rope.scaling.factor": ("factor",),
    "rope.scaling.original_context_length": ("original_max_position_embeddings",),
    "rope.scaling.type": ("rope_type",),
    "rope.scaling.yarn_beta_fast": ("beta_fast",),
    "rope.scaling.yarn_beta_slow": ("beta_slow",),
}

# Settings that follow from the shapes of tensors or the kinds of blocks, so a model with a wrong one cannot load.
_SHAPES = {
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "block_count", "context_length"),
    *("embedding_length", "expert_count", "expert_feed_forward_length", "expert_shared_feed_forward_length"),
    *("feed_forward_length", "nextn_predict_layers", "rope.dimension_sections", "rope.scaling.finetuned"),
    *("shortconv.l_cache", "ssm.conv_kernel", "ssm.group_count", "ssm.inner_size", "ssm.state_size"),
    *("ssm.time_step_rank", "tensor_data_layout", "use_parallel_residual", "vocab_size"),
}

# Names of tokenizers whose text transformers splits as GPT-2 does, and rightly: their merges never join digits.
_GPT2_SPLITS = {"gpt-2", "phi-2", "mpt", "olmo", "smollm", "starcoder", "refact", "codeshell"}

_NEUTRAL = {"attention.causal": True, "rope.scaling.factor": 1.0, "rope.scaling.type": "none", "ssm.dt_b_c_rms": False}


def check_gguf(path: Path) -> PreTrainedConfig:
    """Return the configuration of the model in a GGUF file.

    Raises
    ------
    ValueError
        If the file is damaged or one of several parts, or if transformers does not read its architecture or one of
        its settings.
    """
    reader = _open(path)
    architecture, parts = str(_value(reader, "general.architecture") or ""), _value(reader, "split.count")
    if parts and parts > 1:
        raise ValueError(f"{path} is one of {parts} parts; merge them with `llama-gguf-split --merge`")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # KeyError among others, where a setting is missing
        raise ValueError(
            f"transformers does not read the architecture {architecture!r} of {path} ({error}); it reads "
            f"{', '.join(_architectures())}. Else {_WAY_OUT}"
        ) from error
    prefix = f"{architecture}."
    fields = {name.removeprefix(prefix): field for name, field in reader.fields.items() if name.startswith(prefix)}
    own = {name: field.contents() for name, field in fields.items()}
    _fill_in(config, own)
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is not None:
        _scale_rope(path, config, torch.from_numpy(factors.copy()))
    for name, value in own.items():
        if not _is_read(name, value, config):
            raise ValueError(f"transformers does not read {prefix}{name} = {value} of {path}; {_WAY_OUT}")
    return config


def check_gguf_tokenizer(path: Path) -> None:
    """Raise ValueError if transformers may split text otherwise than the byte-level tokenizer in a GGUF file does.

    transformers splits as GPT-2 does wherever it does not know the file's ``tokenizer.ggml.pre``. Versions without that
    table split by the architecture, and pass.
    """
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as known
    except ImportError:
        return
    reader = _open(path)
    kind, split = (_value(reader, f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind == "gpt2" and split not in _GPT2_SPLITS | known.keys():
        raise ValueError(
            f"transformers does not know how the tokenizer in {path} splits text (tokenizer.ggml.pre is {split}); pass "
            f"tokenizer=, such as the folder that the file was converted from"
        )


def load_gguf(
    path: Path, config: PreTrainedConfig, *, dtype: torch.dtype, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model in a GGUF file, its weights dequantised, and transformers' report of the loading.

    Parameters
    ----------
    config : PreTrainedConfig
        What :func:`check_gguf` returned.
    dtype : torch.dtype
        Of the dequantised weights.
    **options
        Passed to ``from_pretrained``.

    Raises
    ------
    ValueError
        If transformers cannot load the tensors, or does not read one of them.
    """
    if hasattr(transformers, "GgufConfig"):  # versions without it only know this way
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    options |= {"config": config, "dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, report = load(path.parent, gguf_file=path.name, **options)
    except Exception as error:  # of tensors' types and shapes, in many kinds
        raise ValueError(f"transformers cannot load {path}: {' '.join(str(error).split())}; {_WAY_OUT}") from error
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        vars(owner).pop(name, None)  # dequantised, it is a plain model: to move, to edit and to save
    model.is_quantized = False
    _check_tensors(path, model)
    return model, report


def _open(path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader's own, NumPy's, the system's
        raise ValueError(f"cannot read {path} as a GGUF file ({error}); if it is incomplete, fetch it again") from error


def _value(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _fill_in(config: Any, settings: dict[str, Any]) -> None:
    """Set the head width and the rotary base from the file, because in some families transformers ignores them."""
    if "attention.key_length" in settings and hasattr(config, "head_dim") and not hasattr(config, "global_head_dim"):
        config.head_dim = settings["attention.key_length"]
    if "rope.freq_base" in settings and "rope_theta" in (getattr(config, "rope_parameters", None) or {}):
        config.rope_parameters["rope_theta"] = settings["rope.freq_base"]


def _architectures() -> list[str]:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return sorted({*GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer", "t5", "umt5"})


def _is_read(key: str, value: Any, config: PreTrainedConfig) -> bool:
    if key in _SHAPES or (key in _NEUTRAL and value == _NEUTRAL[key]):
        return True
    settings = list(_settings(config.to_dict()))
    if key == "rope.dimension_count":
        heads: Any = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        partial = [found for name, found in settings if name == "partial_rotary_factor" and found] or [1.0]
        return value in {int(heads * fraction) for fraction in partial}
    return any(name in _NAMES.get(key, ()) and _same(found, value) for name, found in settings)


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        yield name, value
        if isinstance(value, dict):
            yield from _settings(value)


def _same(found: Any, value: Any) -> bool:
    if isinstance(found, (int, float)) and isinstance(value, (int, float)):
        return math.isclose(found, value, rel_tol=1e-6)  # the file's are float32
    return found == value


def _scale_rope(path: Path, config: Any, factors: torch.Tensor) -> None:
    """Give `config` the scaled rotary embedding of Llama 3, of which the file holds the factors alone."""
    theta = config.rope_parameters["rope_theta"]
    scaled = {"rope_type": "llama3", "rope_theta": theta, "factor": factors.max().item()}
    scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    plain = theta ** -(torch.arange(len(factors), dtype=torch.float64) / len(factors))
    config.rope_parameters = scaled
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    if not torch.allclose(frequencies.double(), plain / factors.double(), rtol=1e-4, atol=0):
        raise ValueError(f"the factors rope_freqs.weight of {path} are not those of Llama 3; {_WAY_OUT}")


def _check_tensors(path: Path, model: PreTrainedModel) -> None:
    """Raise ValueError if the file holds more numbers than the model took."""
    blocks = model.config.get_text_config().num_hidden_layers
    tensors = {tensor.name: tensor for tensor in _open(path).tensors if tensor.name != "rope_freqs.weight"}
    for name in list(tensors):
        block = name.split(".")[1] if name.startswith("blk.") else "0"
        if int(block) >= blocks:  # a block that predicts further tokens, no part of the model
            del tensors[name]
    head, embedding = tensors.get("output.weight"), tensors["token_embd.weight"]
    if head is not None and model.config.get_text_config().tie_word_embeddings:
        if head.tensor_type != embedding.tensor_type or (head.data != embedding.data).any():
            raise ValueError(f"{path} has an output head of its own, which transformers does not read; {_WAY_OUT}")
        del tensors["output.weight"]
    # A weight that is offloaded has no address; one that two modules share counts once.
    taken = {tensor.data_ptr() or name: tensor.numel() for name, tensor in model.state_dict().items()}
    held = sum(int(tensor.n_elements) for tensor in tensors.values())
    if held > sum(taken.values()):
        raise ValueError(
            f"{path} holds {held:,} numbers and {type(model).__name__} takes {sum(taken.values()):,} of them: "
            f"transformers does not read all tensors; {_WAY_OUT}"
        )
