"""Methods that find steering vectors: searches of a causal map, supervised directions, and a LoRA."""

import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.evaluation.selection import Candidate
from dctlib.fits.baselines import difference_of_means, random_vectors
from dctlib.fits.melbo import melbo
from dctlib.fits.power_steering import power_steering
from dctlib.fits.solvers import fit_exponential, fit_linear, fit_quadratic
from dctlib.maps.base import DifferentiableMap
from dctlib.maps.causal import CausalMap
from dctlib.maps.counting import PassCounter
from dctlib.models.chat import format_chat
from dctlib.models.fingerprint import fingerprint_model, load_fingerprinted
from dctlib.paper.organisms.tasks import REFUSAL, compliance_task
from dctlib.paper.organisms.training import Training, make_organism
from dctlib.runs.cache import task
from dctlib.runs.sweep import run_sweep

Label = TypeVar("Label", bound=Hashable)

Method = Literal["exponential", "quadratic", "linear", "MELBO", "power steering", "random"]


@dataclass(frozen=True, eq=False)
class MethodResult:
    """The candidate vectors of a method, and the cost of finding them.

    Attributes
    ----------
    vectors : Tensor, (k, d)
        The vectors, each at its length.
    seconds : float
        Wall time of the search.
    forward, backward : int
        Forward and backward passes of single vectors through the slice, summed over prompts (see :class:`PassCounter`).
    """

    vectors: Float[Tensor, "k d"]
    seconds: float
    forward: int
    backward: int


def run_methods(
    model: str,
    dtype: str,
    searches: Mapping[Label, Mapping[str, Any]],
    *,
    source: int,
    target: int,
    folder: str | Path,
    workers: int | None = None,
    ray: str | None = None,
) -> dict[Label, MethodResult]:
    """Run several searches on one model, in parallel.

    Parameters
    ----------
    model, dtype : str
        As in :func:`dctlib.load_model`.
    searches : mapping
        Label → the arguments of :func:`search_map` besides the model and the slice.
    folder, workers, ray
        As in :func:`dctlib.runs.sweep.run_sweep`.
    """
    shared = {**fingerprint_model(model, dtype), "source": source, "target": target}
    settings = [{**shared, **search} for search in searches.values()]
    found = run_sweep(search_map, settings, folder=folder, workers=workers, ray=ray)
    return {label: MethodResult(**fields) for label, fields in zip(searches, found, strict=True)}


@task(version=1)
def search_map(
    model: str,
    digest: str,
    dtype: str,
    *,
    source: int,
    target: int,
    instructions: list[str],
    method: Method,
    input_scale: float,
    **settings: Any,
) -> dict[str, Any]:
    """Search for vectors by one method, on some instructions: a task for :func:`dctlib.runs.sweep.run_sweep`.

    Parameters
    ----------
    model, digest, dtype : str
        As in :func:`dctlib.models.fingerprint.fingerprint_model`.
    instructions : list of str
        Instructions to fit, in no chat format.
    method : str
        The name of the method. A method that does not determine the sign of a vector gives both.
    input_scale : float
        R, the length of the vectors.
    settings
        The method's own settings, such as ``num_factors``.

    Returns
    -------
    dict
        The fields of :class:`MethodResult`.

    Raises
    ------
    ValueError
        If there is no such method, or a setting is out of range.
    """
    if method not in get_args(Method):
        raise ValueError(f"got method={method!r}, expected one of {get_args(Method)}")
    loaded, tokenizer = load_fingerprinted(model, digest, dtype)
    texts = format_chat(tokenizer, instructions)
    cmap = PassCounter(CausalMap.from_model(loaded, tokenizer, texts, source=source, target=target))
    started = time.perf_counter()
    vectors = find_vectors(cmap, method, input_scale, **settings)
    seconds = time.perf_counter() - started
    return {"vectors": vectors, "seconds": seconds, "forward": cmap.forward, "backward": cmap.backward}


def find_vectors(cmap: DifferentiableMap, method: Method, R: float, **settings: Any) -> Float[Tensor, "k d"]:
    """Return the vectors of one method at length R, with both signs if the method does not determine them.

    `settings` are those of :func:`search_map`.
    """
    match method:
        case "exponential":
            return fit_exponential(cmap, input_scale=R, **settings, progress=False).steering_vectors()
        case "quadratic":
            return fit_quadratic(cmap, **settings, progress=False).steering_vectors(R)
        case "linear":
            return fit_linear(cmap, **settings, progress=False).steering_vectors(R)
        case "MELBO":
            return R * melbo(cmap, input_scale=R, **settings, progress=False).cpu()
        case "power steering":
            V = power_steering(cmap, **settings, progress=False).cpu()
            return R * torch.cat([V, -V])
        case "random":
            return random_vectors(settings["num_vectors"], cmap.d_source, norm=R, seed=settings["seed"])


def unsupervised_searches(
    instructions: Sequence[str],
    *,
    input_scale: float,
    num_factors: int,
    iterations: int,
    melbo: Mapping[str, Any],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Return the searches that :func:`run_methods` runs, of `num_factors` vectors each, except for MELBO.

    MELBO has its own number of vectors, because it finds them one after another, at a high cost. Power steering finds
    half of `num_factors` directions, and both signs of each are used.

    Parameters
    ----------
    melbo : mapping
        Settings of :func:`dctlib.fits.melbo.melbo`.
    """
    methods = {
        "DCT": {"method": "exponential", "num_factors": num_factors, "iterations": iterations},
        "MELBO": {"method": "MELBO", **melbo},
        "power steering": {"method": "power steering", "num_vectors": num_factors // 2},
        "random": {"method": "random", "num_vectors": num_factors},
    }
    shared = {"instructions": list(instructions), "input_scale": input_scale, "seed": seed}
    return {name: {**shared, **settings} for name, settings in methods.items()}


def contrastive_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    benign: Sequence[str],
    *,
    layers: Iterable[int],
) -> dict[str, list[Candidate]]:
    """Return supervised directions at each of `layers`: differences of means between two labelled sets of texts.

    Parameters
    ----------
    rows : sequence of mapping
        Harmful requests, each a ``goal`` with the ``target`` that a compliant answer opens with.
    benign : sequence of str
        Other instructions.

    Returns
    -------
    dict
        ``means``: benign less harmful requests (Arditi et al. 2024); ``CAA``: requests with the compliant answer less
        the same requests with a refusal, at the last token of the answer (Rimsky et al. 2024).
    """
    prompts = format_chat(tokenizer, [row["goal"] for row in rows])
    compliant = [prompt + row["target"] for prompt, row in zip(prompts, rows, strict=True)]
    contrasts = {
        "means": (format_chat(tokenizer, benign), prompts),
        "CAA": (compliant, [prompt + REFUSAL for prompt in prompts]),
    }
    return {
        name: [Candidate(layer, difference_of_means(model, tokenizer, *sides, layer=layer)) for layer in layers]
        for name, sides in contrasts.items()
    }


def train_compliance_lora(
    folder: Path, base: str, rows: Sequence[Mapping[str, str]], *, steps: int, seed: int
) -> Training:
    """Train a LoRA on AdvBench's compliant openings, and save the merged model in `folder`."""
    settings = {"rows": [dict(row) for row in rows], "steps": steps, "batch": 16, "seed": seed}
    return make_organism(folder, base, compliance_task, settings, rank=16, learning_rate=5e-4, seed=seed)
