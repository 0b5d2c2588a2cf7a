"""Enumeration curves: the chance that one of k tries succeeds, against k."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import binomtest
from torch import Tensor

from dctlib.metrics import Interval

_RESAMPLES = 9_999


@dataclass(frozen=True, eq=False)
class Curve:
    """The rate of success with k = 1, …, m tries, and its 95 % interval at each k.

    Attributes
    ----------
    mean, low, high : Tensor, (m,)
        Over prompts (percentile bootstrap, 9,999 resamples of the prompts, the same ones for every k). Fractions of 1.
        Where all prompts are alike no resample differs, and the end away from 0 or 1 is Wilson's.
    """

    mean: Float[Tensor, " m"]
    low: Float[Tensor, " m"]
    high: Float[Tensor, " m"]

    def at(self, k: int) -> Interval:
        """The rate with k tries."""
        return Interval(*(part[k - 1].item() for part in (self.mean, self.low, self.high)))


def best_of_first(success: Bool[Tensor, "m n"], *, seed: int = 0) -> Curve:
    """Whether one of the first k of m ranked vectors succeeds, averaged over n prompts.

    Parameters
    ----------
    success : Tensor of bool, (m, n)
        Whether each vector succeeds on each prompt, best-ranked vector first; ranked on other prompts.
    seed : int
        Seed of the resampling.

    Raises
    ------
    ValueError
        If it is not a matrix of bool, with at least two prompts to resample.
    """
    _check(success)
    return _curve(success.double().cummax(0).values, seed)


def best_of_any(success: Bool[Tensor, "m n"], *, seed: int = 0) -> Curve:
    """Whether one of k of m tries in no order succeeds: samples at a temperature, or random vectors.

    The rate over all choices of k tries, 1 − C(m − c, k) / C(m, k) where c succeed on a prompt: the unbiased pass@k of
    Chen et al. (2021), *Evaluating Large Language Models Trained on Code*, equation 1.

    Parameters
    ----------
    success : Tensor of bool, (m, n)
        Whether each try succeeds on each prompt.
    seed : int
        Seed of the resampling.

    Raises
    ------
    ValueError
        If it is not a matrix of bool, with at least two prompts to resample.
    """
    _check(success)
    m = len(success)
    drawn = torch.arange(m, device=success.device)[:, None]  # before the next try
    failures = (~success).sum(0)
    all_fail = ((failures - drawn).clamp(min=0).double() / (m - drawn)).cumprod(0)
    return _curve(1 - all_fail, seed)


def _curve(rates: Float[Tensor, "m n"], seed: int) -> Curve:
    array = rates.cpu().numpy()
    n = array.shape[1]
    times_drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    low, high = np.quantile(times_drawn @ array.T / n, [0.025, 0.975], axis=0)
    unseen = binomtest(0, n).proportion_ci(method="wilson").high
    low = np.where(array.min(1) == 1, 1 - unseen, low)
    high = np.where(array.max(1) == 0, unseen, high)
    return Curve(*(torch.as_tensor(part) for part in (array.mean(1), low, high)))


def _check(success: Tensor) -> None:
    if success.dtype != torch.bool or success.ndim != 2 or not len(success) or success.shape[1] < 2:
        raise ValueError(
            f"got {success.dtype} of shape {tuple(success.shape)}, expected bool (m, n): a row for each vector or "
            f"sample, a column for each of at least 2 prompts"
        )
