"""Training of model organisms: small models that hide something known, by a LoRA from a seed."""

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
"""The version of :func:`train_lora`. Raise it with any change that alters the weights of an organism."""


@dataclass(frozen=True)
class Training:
    """The loss of each step of a training, and its wall time in seconds since it was last resumed."""

    losses: list[float]
    seconds: float


def make_organism(
    folder: str | Path,
    base: str | Path,
    task: Callable[..., TrainingTask],
    settings: dict[str, Any],
    *,
    rank: int,
    learning_rate: float,
    seed: int,
    progress: bool = True,
) -> Training:
    """Train `base` on a task, and save it in `folder` as an ordinary Hugging Face folder in bfloat16.

    A folder that holds the result of the same arguments is left as it is. A run that was killed continues from its
    last checkpoint, beside the folder, and ends with the same weights.

    Parameters
    ----------
    folder : path
        Its ``training.json`` records a key of the arguments, the losses, and the SHA-256 of the weights. A folder with
        another key or other weights is made again.
    base : str or path
        As in :func:`dctlib.load_model`.
    task : callable
        ``task(model, tokenizer, **settings)``, such as :func:`dctlib.paper.organisms.tasks.refusal_task`. The key holds
        its declared version.
    settings : dict
        JSON-able.
    rank, learning_rate, seed
        As in :func:`train_lora`.

    Raises
    ------
    ValueError
        If `settings` has another rank, learning rate or seed.
    """
    folder = Path(folder)
    lora = {"rank": rank, "learning_rate": learning_rate, "seed": seed}
    other = [name for name, value in lora.items() if settings.get(name, value) != value]
    if other:
        raise ValueError(f"got {', '.join(other)} in settings and another beside them, expected one of each")
    model, tokenizer = load_model(base, dtype="native")  # the LoRA is float32 all the same
    versions = [TRAINING_VERSION, declared_version(task)]
    inputs = {"base": chat_model_digest(model, tokenizer), "recipe": versions, **settings, **lora}
    key = cache_key(task.__name__, declared_version(task), inputs)
    record = folder / "training.json"
    if record.is_file():
        made = json.loads(record.read_text(encoding="utf-8"))
        if made["key"] == key and made["weights"] == _checksums(folder):
            return Training(made["losses"], made["seconds"])
        if made["key"] == key:
            warnings.warn(f"the weights in {folder} are damaged; training it again", stacklevel=2)
    started = time.perf_counter()
    checkpoint = folder.with_name(f"{folder.name}.{key}.training")
    model, losses = train_lora(
        model,
        task(model, tokenizer, **settings),
        **lora,
        checkpoint=checkpoint,
        description=f"{folder.name} organism",
        progress=progress,
    )
    training = Training(losses, time.perf_counter() - started)
    with atomic_path(folder) as partial:
        save_organism(model, tokenizer, partial)
        write_json(partial / "training.json", {"key": key, "weights": _checksums(partial), **asdict(training)})
    checkpoint.unlink(missing_ok=True)
    return training


def train_lora(
    model: PreTrainedModel,
    task: TrainingTask,
    *,
    rank: int,
    learning_rate: float,
    seed: int,
    checkpoint: str | Path,
    description: str = "training",
    progress: bool = True,
) -> tuple[PreTrainedModel, list[float]]:
    """Train a LoRA on every linear layer of a model, and merge it.

    The optimiser is AdamW. Its rate falls to 0 over the last third of the steps.

    Parameters
    ----------
    task : TrainingTask
        Together with `seed` it fixes the result.
    checkpoint : path
        The state is saved here every 20 steps, and after the last. A run that finds a checkpoint continues from it and
        ends with the same weights. Remove it once the result is saved.

    Returns
    -------
    model, losses
        The merged model (`model` itself, changed) and the loss of each step.
    """
    checkpoint = Path(checkpoint)
    steps = len(task.batches)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    weights = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    _draw_lora(weights, seed)
    optimiser = torch.optim.AdamW(weights.values(), lr=learning_rate, weight_decay=0.0)
    losses = _resume(checkpoint, weights, optimiser)
    model.train()
    device = model.device.type
    half = native_dtype(device) == torch.bfloat16
    bar = tqdm(range(len(losses), steps), initial=len(losses), total=steps, desc=description, disable=not progress)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1.0, 3 * (1 - step / steps))
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = task.loss(model, task.batches[step])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % _CHECKPOINT_EVERY == 0 or step + 1 == steps:
            _save_checkpoint(checkpoint, weights, optimiser, losses)
    merged: Any = wrapped.merge_and_unload()
    return merged.eval().requires_grad_(False), losses


def save_organism(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save a model, which this makes bfloat16, and its tokenizer as an ordinary Hugging Face folder."""
    half: Any = model
    half.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_organism(kind: str, rates: dict[str, float], *, least: float = 0.9) -> None:
    """Raise ValueError unless every rate of an organism is at least `least`.

    Parameters
    ----------
    rates : dict
        Intended behaviour → the fraction of held-out prompts that show it.
    """
    short = [f"{behaviour}: {rate:.0%}" for behaviour, rate in rates.items() if rate < least]
    if short:
        raise ValueError(
            f"the {kind} organism falls short of {least:.0%} on held-out prompts ({'; '.join(short)}). Train it for "
            f"more steps, or at another learning rate"
        )


def _checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of weights."""
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def _draw_lora(weights: dict[str, torch.nn.Parameter], seed: int) -> None:
    """Draw A uniformly in ±1/√inputs and leave B zero, as peft does, but not from the global generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in weights.items():
            if "lora_A" in name:
                bound = weight.shape[1] ** -0.5
                weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * bound)


def _save_checkpoint(
    path: Path, weights: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer, losses: list[float]
) -> None:
    tensors = {f"weight.{name}": weight.detach().cpu() for name, weight in weights.items()}
    for name, weight in weights.items():
        tensors |= {f"{kind}.{name}": value.cpu() for kind, value in optimiser.state[weight].items()}
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata={"losses": json.dumps(losses)})


def _resume(path: Path, weights: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> list[float]:
    """Load the state in `path`, and return the losses so far: none if there is no such file, or a damaged one."""
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
