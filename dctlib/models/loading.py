"""Loading a causal language model and its tokenizer."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from dctlib.models.adapters import merge_adapter, read_base
from dctlib.models.checkpoints import check_checkpoint, load_weights
from dctlib.models.gguf import check_gguf_tokenizer
from dctlib.models.sources import TOKENIZER, Source, find_source


def load_model(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready for inference.

    Parameters
    ----------
    name : str or path
        One of these:

        - a pinned model: ``"qwen2.5-coder-0.5b-instruct"``, ``"qwen2.5-coder-1.5b-instruct"`` or
          ``"smollm2-135m-instruct"``;
        - a local Hugging Face folder, absolute or relative to the working directory or to the repository. Of a
          vision-language model, text alone is used;
        - a Hub id, best with its commit: ``"owner/name@revision"``. Without one, a warning names the commit that came;
        - a GGUF file, whose weights are dequantised: a path, or ``"owner/name/file.gguf@revision"`` on the Hub;
        - a PEFT adapter, a folder or Hub id: it is merged into the model that its configuration names.

        Remote code is never run, and nothing pickled is read.
    device : str or torch.device, optional
        The default is CUDA if there is one, else the CPU. ``"auto"``, for a model too large for one GPU, spreads its
        blocks over all GPUs, and the rest over main memory (accelerate's ``device_map``).
    dtype : str or torch.dtype, optional
        ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"``, or ``"native"``: bfloat16 where it is
        faster (see :func:`native_dtype`), float32 elsewhere. The default is bfloat16 on CUDA and float32 on a CPU; a
        quantised model keeps the type in which it was saved.
    tokenizer : str, optional
        Where the tokenizer is, if not beside the model, in one of the forms of `name`.

    Returns
    -------
    model, tokenizer
        The model in evaluation mode with gradients off for its weights; the tokenizer with a padding token.

    Raises
    ------
    ValueError
        If `name` is none of these or not a causal language model, its files are damaged, incomplete or pickled, it
        needs a package that is not installed, `dtype` or `device` is unknown, or a pinned model cannot be fetched or
        converted.
    """
    spread = device == "auto"
    device = _device(None if spread else device)
    weights_dtype = _dtype(dtype, device)
    found = source = find_source(name)
    if base := read_base(found):
        source = find_source(base)
    config = check_checkpoint(source)
    beside = found if found.has(TOKENIZER) else source
    loaded_tokenizer = _load_tokenizer(find_source(tokenizer, of=TOKENIZER) if tokenizer else beside)
    if dtype is None and getattr(config, "quantization_config", None):
        weights_dtype = None
    model = load_weights(source, config, device=device, dtype=weights_dtype, spread=spread)
    if found is not source:
        model = merge_adapter(model, found)
    if found.revision and not str(name).endswith(f"@{found.revision}"):
        warnings.warn(f"{name} names no commit; what came is {name}@{found.revision}", stacklevel=2)
    return model.eval().requires_grad_(False), loaded_tokenizer


def _load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    name = source.location
    if source.gguf:
        check_gguf_tokenizer(source.gguf)
    try:
        if source.gguf:
            tokenizer = AutoTokenizer.from_pretrained(source.gguf.parent, gguf_file=source.gguf.name)
        else:
            tokenizer = _tokenizer_class(source).from_pretrained(name, **source.options)
    except OSError as error:
        raise ValueError(f"there is no tokenizer beside {name!r}; pass tokenizer= ({error})") from error
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(
            f"cannot read the tokenizer of {name!r} ({error}); are its files damaged? Fetch them again"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"the tokenizer of {name!r} has no words; add its files, or pass tokenizer=")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_class(source: Source) -> Any:
    """Return the class that reads the tokenizer as it was saved.

    AutoTokenizer puts a family's own splitting rules in place of those in the file, for Qwen2 among others.
    """
    if {"tokenizer.json", "tokenizer_config.json"} <= source.files:
        saved = json.loads(source.fetch("tokenizer_config.json").read_text(encoding="utf-8"))
        if saved.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return PreTrainedTokenizerFast
    return AutoTokenizer


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # RuntimeError, or AssertionError in a build without CUDA
        raise ValueError(f"got device {device!r}, which this machine and this torch lack: {error}") from error


def native_dtype(device: str | torch.device) -> torch.dtype:
    """Return bfloat16 where `device` multiplies it faster than float32 (CUDA, AMX, AMD's AVX-512 BF16), else float32.

    Intel's cores have AVX-512 BF16 too, but without AMX they multiply bfloat16 at half of float32's rate (measured
    with torch 2.13: 118 against 233 GFLOPS on two cores).
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    cpu = torch.cpu.get_capabilities()
    fast = cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "Intel" not in str(cpu.get("cpu_name")))
    return torch.bfloat16 if fast else torch.float32


def dtype_name(dtype: str) -> str:
    """Return the name of the type that `dtype`, which may be ``"native"``, stands for on this machine."""
    return str(_dtype(dtype, _device(None))).removeprefix("torch.")


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype == "native":
        return native_dtype(device)
    known: dict[Any, torch.dtype] = {
        name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")
    }
    if dtype not in known and dtype not in known.values():
        raise ValueError(f"got dtype {dtype!r}, expected 'native', 'float32', 'bfloat16', 'float16' or 'float64'")
    return known.get(dtype) or dtype  # pyright: ignore[reportReturnType]


def silence_transformers() -> None:
    """Turn off the progress bars and advice of transformers; those of dctlib remain."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
