"""GGUF files of tiny models, as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

_EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "norm_epsilon")


def write_gguf(
    path: Path,
    model: Any,
    architecture: str,
    *,
    changes: dict[str, Any] | None = None,
    split: str | None = "gpt-2",
    **extra: Any,
) -> None:
    """Write a model in float32 with a byte-level tokenizer.

    `changes` replaces settings, by their names without the architecture. `split` is how the tokenizer splits text.
    `extra` are further tensors.
    """
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    settings = {
        "context_length": 64,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
    }
    if rope := getattr(config, "rope_parameters", None):
        settings["rope.freq_base"] = float(rope["rope_theta"])
        settings["rope.dimension_count"] = getattr(config, "head_dim", None) or config.hidden_size // 4
        settings["attention.head_count_kv"] = config.num_key_value_heads
        settings["feed_forward_length"] = config.intermediate_size
    epsilon = next(getattr(config, name) for name in _EPSILONS if hasattr(config, name))
    rms = hasattr(config, "rms_norm_eps")
    settings["attention.layer_norm_rms_epsilon" if rms else "attention.layer_norm_epsilon"] = float(epsilon)
    for name, value in {**settings, **(changes or {})}.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(name if name.startswith("split.") else f"{architecture}.{name}", value)
    _add_tokenizer(writer, config.vocab_size, split)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", _converted(name, weight.float(), config, architecture))
    for name, weight in extra.items():
        writer.add_tensor(f"{name.replace('__', '.')}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _converted(name: str, weight: torch.Tensor, config: Any, architecture: str) -> np.ndarray:
    """Return a weight as llama.cpp keeps it."""
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):  # its rotary pairs are neighbours
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
    if architecture == "gemma2" and "norm" in name:
        weight = weight + 1
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        weight = weight.T
    return weight.contiguous().numpy()


def _add_tokenizer(writer: gguf.GGUFWriter, vocabulary: int, split: str | None) -> None:
    writer.add_tokenizer_model("gpt2")
    if split is not None:
        writer.add_tokenizer_pre(split)
    letters = [chr(0x100 + i) for i in range(vocabulary - 1)]
    writer.add_token_list([*letters, letters[0] + letters[1]])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}")
