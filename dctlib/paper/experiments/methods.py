"""Entrants: the vectors that methods find which know nothing but the causal map, and what finding them takes."""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from dctlib.fits.baselines import random_vectors
from dctlib.fits.melbo import melbo
from dctlib.fits.power_steering import power_steering
from dctlib.fits.solvers import fit_exponential, fit_linear, fit_quadratic
from dctlib.maps.base import DifferentiableMap
from dctlib.maps.causal import CausalMap
from dctlib.maps.counting import PassCounter
from dctlib.models.chat import format_chat
from dctlib.models.fingerprint import fingerprint_model, load_fingerprinted
from dctlib.runs.cache import task
from dctlib.runs.sweep import run_sweep

Label = TypeVar("Label", bound=Hashable)


@dataclass(frozen=True, eq=False)
class MethodResult:
    """A method's candidate vectors and what finding them took.

    Attributes
    ----------
    vectors : Tensor, (k, d)
        At their length.
    seconds : float
        Wall time of the search.
    forward, backward : int
        Passes of single vectors through the slice, over all prompts (see :class:`PassCounter`).
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
    """Let methods search causal maps of one model, several at a time, each once (:func:`dctlib.runs.sweep.run_sweep`).

    Parameters
    ----------
    model, dtype : str
        What :func:`dctlib.load_model` takes.
    searches : mapping
        Label → what :func:`search_map` takes beside the model and the slice: ``method``, ``instructions``,
        ``input_scale`` and the method's own settings.
    folder, workers, ray
        As in :func:`dctlib.runs.sweep.run_sweep`.
    """
    where = {**fingerprint_model(model, dtype), "source": source, "target": target}
    settings = [{**where, **of} for of in searches.values()]
    found = run_sweep(search_map, settings, folder=folder, workers=workers, ray=ray)
    return {label: MethodResult(**of) for label, of in zip(searches, found, strict=True)}


@task(version=1)
def search_map(
    model: str,
    digest: str,
    dtype: str,
    *,
    source: int,
    target: int,
    instructions: list[str],
    method: str,
    input_scale: float,
    **settings: Any,
) -> dict[str, Any]:
    """Let a method search the causal map of some instructions for vectors of length `input_scale`.

    A task for :func:`dctlib.runs.sweep.run_sweep`.

    Parameters
    ----------
    model, digest, dtype : str
        See :func:`dctlib.models.fingerprint.fingerprint_model`.
    instructions : list of str
        User turns, in no chat format.
    method : str
        ``exponential``, ``quadratic``, ``linear``, ``MELBO``, ``power steering`` or ``random``. Where a method leaves
        the sign of a vector open, both are there.
    settings
        The method's own, such as ``num_factors``.

    Returns
    -------
    dict
        The fields of :class:`MethodResult`.

    Raises
    ------
    ValueError
        If there is no such method, or a setting is out of range.
    """
    if method not in _METHODS:
        raise ValueError(f"got method={method!r}, expected one of {sorted(_METHODS)}")
    opened, tokenizer = load_fingerprinted(model, digest, dtype)
    texts = format_chat(tokenizer, instructions)
    cmap = PassCounter(CausalMap.from_model(opened, tokenizer, texts, source=source, target=target))
    started = time.perf_counter()
    vectors = _METHODS[method](cmap, input_scale, **settings)
    seconds = time.perf_counter() - started
    return {"vectors": vectors, "seconds": seconds, "forward": cmap.forward, "backward": cmap.backward}


def _exponential(cmap: DifferentiableMap, R: float, **settings: Any) -> Tensor:
    return fit_exponential(cmap, input_scale=R, **settings, progress=False).steering_vectors()


def _quadratic(cmap: DifferentiableMap, R: float, **settings: Any) -> Tensor:
    return fit_quadratic(cmap, **settings, progress=False).steering_vectors(R)


def _linear(cmap: DifferentiableMap, R: float, **settings: Any) -> Tensor:
    return fit_linear(cmap, **settings, progress=False).steering_vectors(R)


def _melbo(cmap: DifferentiableMap, R: float, **settings: Any) -> Tensor:
    return R * melbo(cmap, input_scale=R, **settings, progress=False).cpu()


def _power_steering(cmap: DifferentiableMap, R: float, **settings: Any) -> Tensor:
    V = power_steering(cmap, **settings, progress=False).cpu()
    return R * torch.cat([V, -V])


def _random(cmap: DifferentiableMap, R: float, *, num_vectors: int, seed: int) -> Tensor:
    return random_vectors(num_vectors, cmap.d_source, norm=R, seed=seed)


_METHODS: dict[str, Callable[..., Tensor]] = {
    "exponential": _exponential,
    "quadratic": _quadratic,
    "linear": _linear,
    "MELBO": _melbo,
    "power steering": _power_steering,
    "random": _random,
}
