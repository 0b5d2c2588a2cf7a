"""Loading a causal language model and its tokenizer."""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dctlib._io import ROOT
from dctlib.models import assets


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
        A pinned model (``"qwen2.5-coder-0.5b-instruct"``, ``"qwen2.5-coder-1.5b-instruct"`` or
        ``"smollm2-135m-instruct"``), a local Hugging Face folder (absolute, or relative to the working directory or
        to the repository), or a Hub id, best with its commit: ``"owner/name@revision"``. Without a commit, a warning
        names the one that came. Remote code is never run, and weights are read from safetensors only.
    device : str or torch.device, optional
        CUDA where there is one, otherwise the CPU. ``"auto"``, for a model that no GPU holds, spreads its blocks over
        all of them, and over main memory what is left (accelerate's ``device_map``).
    dtype : str or torch.dtype, optional
        ``"float32"``, ``"bfloat16"``, ``"float64"``, or ``"native"``: bfloat16 where it is
        the faster (see :func:`native_dtype`), float32 elsewhere. Left out, bfloat16 on CUDA and
        float32 on a CPU.
    tokenizer : str, optional
        Where the tokenizer is, if not beside the model: likewise.

    Returns
    -------
    model, tokenizer
        The model in evaluation mode with gradients off for its weights; the tokenizer with a padding token.

    Raises
    ------
    ValueError
        If `name` is none of these, its files are damaged or incomplete, `dtype` is unknown, or a pinned model
        cannot be fetched or converted.
    """
    best = "cuda" if torch.cuda.is_available() else "cpu"
    spread = {"device_map": "auto"} if device == "auto" else {}
    device = torch.device(best if spread or device is None else device)
    source, revision = _locate(name)
    loaded_tokenizer = _load_tokenizer(*(_locate(tokenizer) if tokenizer else (source, revision)))
    options = {"dtype": _dtype(dtype, device), "use_safetensors": True, **revision, **spread}  # nothing pickled
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot load the weights of {source!r} from safetensors, the only format read: {error}"
        ) from error
    if not revision and (commit := getattr(model.config, "_commit_hash", None)):
        warnings.warn(f"{name} names no commit; what came is {name}@{commit}", stacklevel=2)
    model = model if spread else model.to(device)
    return model.eval().requires_grad_(False), loaded_tokenizer


def _locate(name: str | Path) -> tuple[str, dict[str, str]]:
    """Return the folder, or the Hub id and its revision, as from_pretrained takes them."""
    if folder := _local_folder(name):
        return str(folder), {}
    source, _, revision = str(name).partition("@")
    return source, {"revision": revision} if revision else {}


def _local_folder(name: str | Path) -> Path | None:
    if str(name) in assets.MODELS:
        return assets.fetch_model(str(name))
    for folder in (Path(name), ROOT / name):
        if (folder / "config.json").is_file():
            return folder
        if folder.is_dir():
            raise ValueError(f"{folder} is a folder without config.json, so not a saved model; did its stage finish?")
    if Path(name).is_absolute() or str(name).startswith((".", "models/")):
        raise ValueError(
            f"no model folder {name}; `dvc repro` makes organisms (`make beyond` those of other seeds or with a "
            f"secret). Or pass one of {sorted(assets.MODELS)}, a Hub id or a folder that save_pretrained wrote"
        )
    return None


def _load_tokenizer(source: str, revision: dict[str, str]) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **revision)
    except OSError as error:
        raise ValueError(
            f"cannot load {source!r}: not a name that dctlib pins ({', '.join(assets.MODELS)}), not a local model "
            f"folder, and not reachable on the Hub. Check the spelling and the network."
        ) from error
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"cannot read the tokenizer of {source!r}: are its files damaged? ({error})") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"the tokenizer of {source!r} has no words: are its files there? Else pass tokenizer=")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "native":
        return native_dtype(device)
    if dtype not in ("float32", "bfloat16", "float64"):
        raise ValueError(f"got dtype {dtype!r}, expected 'native', 'float32', 'bfloat16' or 'float64'")
    return getattr(torch, dtype)


def silence_transformers() -> None:
    """Turn off the progress bars and advice of transformers; those of dctlib remain."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
