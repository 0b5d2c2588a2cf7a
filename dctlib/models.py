"""Causal language models: loading them, and naming their parts. The only file that knows model families."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dctlib import assets
from dctlib.store import ROOT

# Where each family keeps its list of blocks and the norm behind the last one.
_BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.language_model.layers")
_FINAL_NORMS = ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm", "model.language_model.norm")


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
        A pinned asset (``"smollm2-135m-instruct"``), a local Hugging Face folder (absolute, or relative to the
        working directory or to the repository), or a Hub id, best with its commit: ``"owner/name@revision"``;
        without one, a warning names the commit that came.
        Remote code is never run, and weights are read from safetensors only.
    device : str or torch.device, optional
        CUDA where there is one, otherwise the CPU. ``"auto"``, for a model that no GPU holds, spreads its blocks over
        all of them, and over main memory what is left (accelerate's ``device_map``).
    dtype : str or torch.dtype, optional
        ``"float32"``, ``"bfloat16"``, ``"float64"``, or ``"native"``: bfloat16 where the device multiplies it in
        hardware (CUDA, and CPUs with AMX or AVX-512 BF16), float32 elsewhere. Left out, bfloat16 on CUDA and
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
        If `name` is none of these, its files are damaged or not all there, or `dtype` is unknown.
    """
    best = "cuda" if torch.cuda.is_available() else "cpu"
    spread = {"device_map": "auto"} if device == "auto" else {}
    device = torch.device(best if spread or device is None else device)
    source, revision = _located(name)
    spoken = _tokenizer(*_located(tokenizer)) if tokenizer else _tokenizer(source, revision)
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
    return model.eval().requires_grad_(False), spoken


def _located(name: str | Path) -> tuple[str, dict[str, str]]:
    """What from_pretrained calls it: a folder, or a Hub id and its revision."""
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


def _tokenizer(source: str, revision: dict[str, str]) -> PreTrainedTokenizerBase:
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
    """bfloat16 where `device` multiplies it in hardware (CUDA, CPUs with AMX or AVX-512 BF16), else float32."""
    if torch.device(device).type == "cpu":
        can = torch.cpu.get_capabilities()
        return torch.bfloat16 if can.get("amx_bf16") or can.get("avx512_bf16") else torch.float32
    return torch.bfloat16


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


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of `model`, in order: block s maps h_s to h_{s+1}."""
    return _part(model, _BLOCKS, nn.ModuleList)


def final_norm_of(model: nn.Module) -> nn.Module:
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
    raise ValueError(f"{type(model).__name__} keeps none of {', '.join(paths)}; add its layout to dctlib/models.py")


@dataclass(frozen=True)
class Writers:
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


def writers_of(model: PreTrainedModel) -> Writers:
    """Everything that writes to the residual stream of `model`."""
    embedding: Any = model.get_input_embeddings()
    positions = getattr(model.base_model, "wpe", None)
    embeddings = [embedding] if positions is None else [embedding, positions]
    modules, projections, normed = [*embeddings], [], False
    for block in blocks_of(model):
        attention = _child(block, "self_attn", "attention", "attn")
        mlp = _child(block, "mlp")
        if hasattr(block, "post_feedforward_layernorm"):  # Gemma 2 and 3, OLMo 2
            normed = True
            modules += [_child(block, "post_attention_layernorm"), _child(block, "post_feedforward_layernorm")]
        else:
            modules += [attention, mlp]
            projections.append(_child(attention, "o_proj", "dense", "c_proj"))
            projections.append(_child(mlp, "down_proj", "dense_4h_to_h", "c_proj"))
    return Writers(modules, embeddings, None if normed else projections)


def _child(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        if isinstance(found := getattr(module, name, None), nn.Module):
            return found
    raise ValueError(f"{type(module).__name__} has none of {', '.join(names)}; add its layout to dctlib/models.py")


# Families whose positions meet in attention alone, under whatever mask and positions they are given.
_BRANCHING = ["gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"]


def branches(model: PreTrainedModel, tokens: int) -> bool:
    """Whether prompts of at most `tokens` tokens may run as one tree (:mod:`dctlib.prompt_tree`)."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return config.model_type in _BRANCHING and (window is None or tokens <= window)


def width_of(model: PreTrainedModel) -> int:
    """The number of residual-stream coordinates, d."""
    return model.config.get_text_config().hidden_size


def check_layer(model: nn.Module, layer: int, *, name: str = "layer") -> int:
    """Return `layer` if `model` has a block of that index, else raise ValueError naming the valid range."""
    count = len(blocks_of(model))
    if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer < count:
        raise ValueError(f"got {name}={layer!r}, expected a block index from 0 to {count - 1} (the model has {count})")
    return int(layer)


def logits_of(model: PreTrainedModel, hidden: Tensor, tokens: Tensor) -> Tensor:
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
    hidden = final_norm_of(model)(hidden)
    with align_module_device(head):  # its weight is used without calling it, which would fetch an offloaded one
        rows, bias = tokens.to(head.weight.device), getattr(head, "bias", None)
        weight = head.weight[rows].to(hidden.device)
        bias = None if bias is None else bias[rows].to(hidden.device)
    return finite(finished(model, nn.functional.linear(hidden, weight, bias)))


def finished(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """What the output head gives, in float32 and with the family's soft cap or scale: the model's own logits."""
    config, logits = model.config.get_text_config(), logits.float()
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits * (getattr(config, "logit_scale", None) or 1.0)


def finite(logits: Tensor) -> Tensor:
    """Return `logits`, or raise ValueError if one is NaN or infinite: it would be ranked before every number."""
    if not torch.isfinite(logits).all():
        raise ValueError(
            "the model gave logits that are not finite: are its weights damaged, or does a block overflow? Try "
            "dtype='float32', or shorter vectors"
        )
    return logits


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model's configuration and parameters: two models share it only if they compute the same thing."""
    digest = hashlib.sha256(repr(model).encode())
    if config := getattr(model, "config", None):
        told = {k: v for k, v in config.to_dict().items() if k[0] != "_" and k != "transformers_version"}
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, _ in model.named_parameters():
        digest.update(name.encode())
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        with align_module_device(module):  # a weight that is offloaded is fetched
            digest.update(getattr(module, leaf).detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with: the tokenizer's own, else its end of text, else the first there is. It is always masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


@contextmanager
def replaying(model: PreTrainedModel) -> Iterator[None]:
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


def quiet() -> None:
    """Turn off transformers' own progress bars and advice; dctlib's bars and errors remain."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
