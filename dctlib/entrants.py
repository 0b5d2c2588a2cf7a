"""Entrants: the vectors that methods find which know nothing but the causal map, and what finding them takes."""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from dctlib.baselines import random_vectors
from dctlib.causal_map import CausalMap
from dctlib.differentiable_map import DifferentiableMap
from dctlib.fit import fit_exponential, fit_linear, fit_quadratic
from dctlib.melbo import melbo, power_steering
from dctlib.pass_counter import PassCounter
from dctlib.pinned_model import open_pinned, pin
from dctlib.prompts import format_chat
from dctlib.sweep import map_fits

Label = TypeVar("Label", bound=Hashable)


@dataclass(frozen=True, eq=False)
class Entrant:
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


def entrants(
    model: str,
    dtype: str,
    searches: Mapping[Label, Mapping[str, Any]],
    *,
    source: int,
    target: int,
    folder: str | Path,
    workers: int | None = None,
    ray: str | None = None,
) -> dict[Label, Entrant]:
    """Let methods search causal maps of one model, several at a time, each once (:func:`dctlib.sweep.map_fits`).

    Parameters
    ----------
    model, dtype : str
        What :func:`dctlib.load_model` takes.
    searches : mapping
        Label → what :func:`search` takes beside the model and the slice: ``method``, ``instructions``,
        ``input_scale`` and the method's own settings.
    folder, workers, ray
        As in :func:`dctlib.sweep.map_fits`.
    """
    where = {**pin(model, dtype), "source": source, "target": target}
    settings = [{**where, **of} for of in searches.values()]
    found = map_fits(search, settings, folder=folder, workers=workers, ray=ray)
    return {label: Entrant(**of) for label, of in zip(searches, found, strict=True)}


def search(
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

    A task for :func:`dctlib.sweep.map_fits`.

    Parameters
    ----------
    model, digest, dtype : str
        See :func:`dctlib.pinned_model.pin`.
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
        The fields of :class:`Entrant`.

    Raises
    ------
    ValueError
        If there is no such method, or a setting is out of range.
    """
    if method not in _METHODS:
        raise ValueError(f"got method={method!r}, expected one of {sorted(_METHODS)}")
    opened, tokenizer = open_pinned(model, digest, dtype)
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
    return R * melbo(cmap, input_scale=R, **settings, progress=False).V.cpu()


def _power_steering(cmap: DifferentiableMap, R: float, **settings: Any) -> Tensor:
    V = power_steering(cmap, **settings, progress=False).V.cpu()
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
