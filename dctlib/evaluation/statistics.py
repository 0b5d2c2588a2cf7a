"""Intervals and rates."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import binomtest, bootstrap
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


_RESAMPLES = 9_999


@dataclass(frozen=True, eq=False)
class Curve:
    """The rate of success with k = 1, …, m tries, and its 95 % interval at each k.

    Attributes
    ----------
    mean, low, high : Tensor, (m,)
        Over prompts (percentile bootstrap, 9,999 resamples of the prompts, the same ones for every k). Fractions of 1.
        Where all prompts are alike no resample differs, and up to Wilson's share of prompts is taken to be otherwise.
    each : Tensor, (m, n)
        The rate of each prompt, over models where there are several.
    """

    mean: Float[Tensor, " m"]
    low: Float[Tensor, " m"]
    high: Float[Tensor, " m"]
    each: Float[Tensor, "m n"]

    def at(self, k: int) -> Interval:
        """The rate with k tries."""
        return Interval(*(part[k - 1].item() for part in (self.mean, self.low, self.high)))

    def paired_difference(self, over: "Curve", k: int) -> Interval:
        """How much higher this rate is with k tries than that of `over` on the same prompts, paired by prompt.

        Where all prompts are alike, its ends are as those of the rates themselves.
        """
        found = interval((self.each[k - 1] - over.each[k - 1]).tolist())
        if found.low < found.high:
            return Interval(*(round(end, 12) for end in astuple(found)))  # sums of thirds miss 0 by a last bit
        other = _unseen(self.each.shape[1])
        return Interval(found.mean, found.mean - other * (1 + found.mean), found.mean + other * (1 - found.mean))


def success_at_k(success: Bool[Tensor, "*models m n"], *, seed: int = 0) -> Curve:
    """Whether one of the first k of m ranked vectors succeeds, averaged over n prompts.

    Parameters
    ----------
    success : Tensor of bool, (m, n) or (models, m, n)
        Whether each vector succeeds on each prompt, best-ranked vector first; ranked on other prompts. Of several
        models a prompt's rate is their mean, so that the interval is for these models and other prompts.
    seed : int
        Seed of the resampling.

    Raises
    ------
    ValueError
        If it is not of bool, with at least two prompts to resample.
    """
    _check(success)
    return _curve(success.double().cummax(-2).values, seed)


def pass_at_k(success: Bool[Tensor, "*models m n"], *, seed: int = 0) -> Curve:
    """Whether one of k of m tries in no order succeeds: samples at a temperature, or random vectors.

    The rate over all choices of k tries, 1 − C(m − c, k) / C(m, k) where c succeed on a prompt: the unbiased pass@k of
    Chen et al. (2021), *Evaluating Large Language Models Trained on Code*, equation 1.

    Parameters
    ----------
    success : Tensor of bool, (m, n) or (models, m, n)
        Whether each try succeeds on each prompt; several models as in :func:`success_at_k`.
    seed : int
        Seed of the resampling.

    Raises
    ------
    ValueError
        If it is not of bool, with at least two prompts to resample.
    """
    _check(success)
    m = success.shape[-2]
    drawn = torch.arange(m, device=success.device)[:, None]  # before the next try
    failures = (~success).sum(-2, keepdim=True)
    all_fail = ((failures - drawn).clamp(min=0).double() / (m - drawn)).cumprod(-2)
    return _curve(1 - all_fail, seed)


def _curve(rates: Float[Tensor, "*models m n"], seed: int) -> Curve:
    each = rates.cpu().reshape(-1, *rates.shape[-2:]).mean(0)
    array = each.numpy()
    n = array.shape[1]
    times_drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    low, high = np.quantile(times_drawn @ array.T / n, [0.025, 0.975], axis=0)
    mean, alike, other = array.mean(1), np.ptp(array, axis=1) == 0, _unseen(n)
    low, high = np.where(alike, mean * (1 - other), low), np.where(alike, mean + (1 - mean) * other, high)
    return Curve(*(torch.as_tensor(part) for part in (mean, low, high)), each=each)


def _unseen(n: int) -> float:
    """The share of prompts that may be otherwise where n are alike: the upper end of Wilson's interval of none."""
    return binomtest(0, n).proportion_ci(method="wilson").high


def _check(success: Tensor) -> None:
    if success.dtype != torch.bool or success.ndim not in (2, 3) or not success.numel() or success.shape[-1] < 2:
        raise ValueError(
            f"got {success.dtype} of shape {tuple(success.shape)}, expected bool (m, n) or (models, m, n): a row for "
            f"each vector or sample, a column for each of at least 2 prompts"
        )


def wilson(rate: float, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval around a rate of so many tries; unlike a bootstrap's, it has a width at 0 and at 1."""
    found = binomtest(round(rate * of), of).proportion_ci(method="wilson")
    return found.low, found.high
