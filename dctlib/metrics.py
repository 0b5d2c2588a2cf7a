"""Numbers about factors and scores: recovery of planted directions, intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import bootstrap
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A mean and the 95 % bootstrap interval around it."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean of `values` with its 95 % interval (percentile bootstrap, 9,999 resamples)."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size < 2:
        raise ValueError(f"got {array.size} values, expected at least 2 to resample")
    found = bootstrap((array,), np.mean, method="percentile", rng=np.random.default_rng(seed)).confidence_interval
    return Interval(float(array.mean()), float(found.low), float(found.high))


@dataclass(frozen=True)
class Similarity:
    """How alike directions are: the ratio of extreme singular values, and |cosine| over all pairs."""

    condition_number: float
    mean_abs_cosine: float
    sd_abs_cosine: float


def similarity(V: Float[Tensor, "m d"]) -> Similarity:
    """Compare at least two unit rows with each other."""
    if len(V) < 2:
        raise ValueError(f"got {len(V)} directions, expected at least 2 to compare")
    V = V.double()
    singular = torch.linalg.svdvals(V)
    rows, columns = torch.triu_indices(len(V), len(V), offset=1)
    cosines = (V @ V.T)[rows, columns].abs()
    condition = (singular[0] / singular[-1].clamp(min=torch.finfo(torch.float64).tiny)).item()
    return Similarity(condition, cosines.mean().item(), cosines.std(correction=0).item())


@dataclass(frozen=True)
class Recovery:
    """How well found directions cover true ones: the mean over true of the best |cosine|, and the share above .99."""

    mean_max_cosine: float
    recovered: float


def recovery(true: Float[Tensor, "k d"], found: Float[Tensor, "m d"], *, threshold: float = 0.99) -> Recovery:
    """Compare unit rows; a direction and its negation count as the same."""
    best = (true.double() @ found.double().T).abs().max(dim=1).values
    return Recovery(best.mean().item(), (best > threshold).double().mean().item())
