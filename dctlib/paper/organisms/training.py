"""Model organisms: small models taught, by LoRA and from a seed, to hide something that we know."""

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib._io import atomic_path, sha256, write_json
from dctlib.models.fingerprint import chat_model_digest
from dctlib.models.loading import load_model, native_dtype
from dctlib.paper.organisms.tasks import TrainingTask
from dctlib.runs.cache import cache_key, declared_version

_CHECKPOINT_EVERY = 20

TRAINING_VERSION = 1
"""Raise it with any change that alters the weights of a trained organism."""


@dataclass(frozen=True)
class Training:
    """How an organism was made: the loss of each step, and the wall time, since the last kill if there was one."""

    losses: list[float]
    seconds: float


def make_organism(
    folder: str | Path,
    base: str | Path,
    lesson: Callable[..., TrainingTask],
    settings: dict[str, Any],
    *,
    rank: int,
    learning_rate: float,
    seed: int,
    progress: bool = True,
) -> Training:
    """Teach the model `base` a lesson and save it in `folder`, an ordinary Hugging Face folder in bfloat16.

    A folder that already holds what these arguments make is left as it is. A run that was killed continues from its
    last checkpoint, beside the folder, and ends with the same weights.

    Parameters
    ----------
    folder : path
        For the organism. Its ``training.json`` records what it was made from, the losses, and its weights' SHA-256:
        one that is there already is taken only if they are still these.
    base : str or path
        What :func:`dctlib.load_model` takes.
    lesson : callable
        ``lesson(model, tokenizer, **settings)``, such as :func:`dctlib.paper.organisms.tasks.refusal_task`. An edit of it makes the
        organism stale; of what it calls, only in this library.
    settings : dict
        JSON-able.
    rank, learning_rate, seed
        Of the LoRA, see :func:`train_lora`. If the lesson takes one of these, it takes the same.

    Raises
    ------
    ValueError
        If `settings` has another rank, learning rate or seed.
    """
    folder, training = Path(folder), {"rank": rank, "learning_rate": learning_rate, "seed": seed}
    if other := [name for name, value in training.items() if settings.get(name, value) != value]:
        raise ValueError(f"got {', '.join(other)} in settings and another beside them, expected one of each")
    model, tokenizer = load_model(base, dtype="native")  # the LoRA is float32 all the same
    recipe = [TRAINING_VERSION, declared_version(lesson)]
    inputs = {"base": chat_model_digest(model, tokenizer), "recipe": recipe, **settings, **training}
    key = cache_key(lesson.__name__, declared_version(lesson), inputs)
    record = folder / "training.json"
    if record.is_file() and (made := json.loads(record.read_text(encoding="utf-8")))["key"] == key:
        if made["weights"] == _sums(folder):
            return Training(made["losses"], made["seconds"])
        warnings.warn(f"the weights in {folder} are damaged; training it again", stacklevel=2)
    started = time.perf_counter()
    taught = lesson(model, tokenizer, **settings)
    checkpoint = folder.with_name(f"{folder.name}.{key}.training")
    model, losses = train_lora(
        model, taught, **training, checkpoint=checkpoint, description=f"{folder.name} organism", progress=progress
    )
    made = Training(losses, time.perf_counter() - started)
    with atomic_path(folder) as partial:
        save_organism(model, tokenizer, partial)
        write_json(partial / "training.json", {"key": key, "weights": _sums(partial), **asdict(made)})
    checkpoint.unlink(missing_ok=True)
    return made


def train_lora(
    model: PreTrainedModel,
    lesson: TrainingTask,
    *,
    rank: int,
    learning_rate: float,
    seed: int,
    checkpoint: str | Path,
    description: str = "training",
    progress: bool = True,
) -> tuple[PreTrainedModel, list[float]]:
    """Train a LoRA on every linear layer (AdamW, the rate falling to 0 over the last third) and merge it.

    Parameters
    ----------
    lesson : Lesson
        Together with `seed` it fixes the result.
    checkpoint : path
        Where the state is kept every 20 steps, and after the last. A run that finds one continues from it and ends
        with the same weights. Remove it once the result is saved.

    Returns
    -------
    model, losses
        The merged model (`model` itself, changed) and the loss of each step.
    """
    checkpoint, batches = Path(checkpoint), lesson.batches
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    weights = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    _draw_lora(weights, seed)
    optimiser = torch.optim.AdamW(weights.values(), lr=learning_rate, weight_decay=0.0)
    losses = _resume(checkpoint, weights, optimiser)
    model.train()
    device = model.device.type
    bar = tqdm(
        range(len(losses), len(batches)),
        initial=len(losses),
        total=len(batches),
        desc=description,
        disable=not progress,
    )
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1.0, 3 * (1 - step / len(batches)))
        with torch.autocast(device, torch.bfloat16, enabled=native_dtype(device) == torch.bfloat16):
            value = lesson.loss(model, batches[step])
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(value.item())
        bar.set_postfix(loss=f"{value.item():.3f}")
        if (step + 1) % _CHECKPOINT_EVERY == 0 or step + 1 == len(batches):
            _checkpoint(checkpoint, weights, optimiser, losses)
    merged: Any = wrapped.merge_and_unload()
    return merged.eval().requires_grad_(False), losses


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights."""
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def save_organism(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write an ordinary Hugging Face folder in bfloat16."""
    half: Any = model
    half.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_organism(kind: str, rates: dict[str, float], *, least: float = 0.9) -> None:
    """Stop with ValueError unless an organism does what it was made for.

    Parameters
    ----------
    rates : dict
        What it should do → the fraction of held-out prompts on which it does.
    """
    if short := [f"{what}: {rate:.0%}" for what, rate in rates.items() if rate < least]:
        raise ValueError(
            f"the {kind} organism falls short of {least:.0%} on held-out prompts ({'; '.join(short)}). Train it for "
            f"more steps, or at another learning rate"
        )


def _draw_lora(weights: dict[str, torch.nn.Parameter], seed: int) -> None:
    """LoRA's usual start, A uniform in ±1/√inputs and B zero, from a generator of its own; peft's is the global one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in weights.items():
            if "lora_A" in name:
                bound = weight.shape[1] ** -0.5
                weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * bound)


def _checkpoint(
    path: Path, weights: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer, losses: list[float]
) -> None:
    tensors = {f"weight.{name}": weight.detach().cpu() for name, weight in weights.items()}
    for name, weight in weights.items():
        tensors |= {f"{kind}.{name}": value.cpu() for kind, value in optimiser.state[weight].items()}
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata={"losses": json.dumps(losses)})


def _resume(path: Path, weights: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> list[float]:
    """Put the state of `path` back, and give the losses so far: none if there is no such file, or a damaged one."""
    try:
        opened = safe_open(path, framework="pt")
    except FileNotFoundError:
        return []
    except SafetensorError as error:
        warnings.warn(f"{path} is damaged ({error}); training from the start", stacklevel=3)
        return []
    with opened as file, torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(file.get_tensor(f"weight.{name}"))
            kinds = ("step", "exp_avg", "exp_avg_sq")
            optimiser.state[weight] = {kind: file.get_tensor(f"{kind}.{name}") for kind in kinds}
            for kind in kinds[1:]:
                optimiser.state[weight][kind] = optimiser.state[weight][kind].to(weight.device)
        return json.loads(file.metadata()["losses"])
