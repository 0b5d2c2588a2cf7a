"""Intervals of means and rates, and the rate of success within k tries."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import binomtest, bootstrap, hypergeom
from scipy.stats import t as student
from torch import Tensor

RESAMPLES = 9_999


@dataclass(frozen=True)
class Interval:
    """A mean and the 95 % interval around it."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of `values` with its 95 % interval (percentile bootstrap, 9,999 resamples).

    Raises
    ------
    ValueError
        If there are fewer than two values.
    """
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size < 2:
        raise ValueError(f"got {array.size} values, expected at least 2 to resample")
    found = bootstrap((array,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return Interval(float(array.mean()), float(found.low), float(found.high))


def crossed_interval(values: Float[np.ndarray, "units prompts"]) -> Interval:
    """Return the mean of a table with its 95 % interval over rows and columns, both of which were drawn.

    Rows are shuffles, seeds or organisms, and columns are prompts that all rows share. The variance of the mean is that
    of row means plus that of column means. The interval is Student's, with the degrees of freedom of the fewer of both,
    so two or three rows make it wide. A single row says nothing about other rows: its interval is over columns alone.

    Raises
    ------
    ValueError
        If there are no two values to compare.
    """
    table = np.asarray(values, dtype=float)
    if table.ndim != 2 or table.size < 2:
        raise ValueError(f"got a table of shape {table.shape}, expected rows and columns with at least 2 values")
    means = [each for each in (table.mean(1), table.mean(0)) if len(each) > 1]
    variance = sum(each.var(ddof=1) / len(each) for each in means)
    freedom = min(len(each) for each in means) - 1
    half = float(student.ppf(0.975, freedom) * np.sqrt(variance))
    mean = float(table.mean())
    return Interval(mean, mean - half, mean + half)


def paired_difference(
    pairs: Sequence[tuple[Float[np.ndarray, "units prompts"], Float[np.ndarray, "units prompts"]]],
) -> Interval:
    """Return how far the first table of each pair lies above the second, averaged over pairs, with its interval.

    Tables are paired row by row and column by column, as for :func:`crossed_interval`. Rows count as far as all tables
    have them.
    """
    rows = min(len(table) for pair in pairs for table in pair)
    return crossed_interval(np.mean([ones[:rows] - others[:rows] for ones, others in pairs], axis=0))


@dataclass(frozen=True, eq=False)
class Curve:
    """The rate of success with k = 1, …, m tries, as a fraction of 1, with its 95 % interval at each k.

    The interval is a percentile bootstrap over prompts, with the same 9,999 resamples for every k. Where all prompts
    have one rate, no resample differs. Then up to the upper end of Wilson's interval of 0 in n are taken to differ.

    Attributes
    ----------
    mean, low, high : Tensor, (m,)
        Over prompts.
    each : Tensor, (m, n)
        The rate of each prompt, a mean over models where there are several.
    """

    mean: Float[Tensor, " m"]
    low: Float[Tensor, " m"]
    high: Float[Tensor, " m"]
    each: Float[Tensor, "m n"]

    def at(self, k: int) -> Interval:
        """Return the rate with k tries."""
        return Interval(*(part[k - 1].item() for part in (self.mean, self.low, self.high)))

    def paired_difference(self, other: "Curve", k: int) -> Interval:
        """Return this rate with k tries less that of `other`, on the same prompts and paired by prompt.

        Where all prompts have one difference, up to Wilson's fraction of them is taken to differ, as in the rates.
        """
        found = interval((self.each[k - 1] - other.each[k - 1]).tolist())
        if found.low < found.high:
            return Interval(*(round(end, 12) for end in astuple(found)))  # sums of thirds miss 0 by a last bit
        unseen = wilson(0, self.each.shape[1])[1]
        return Interval(found.mean, found.mean - unseen * (1 + found.mean), found.mean + unseen * (1 - found.mean))


def success_at_k(success: Bool[Tensor, "*models m n"]) -> Curve:
    """Return how often one of the first k of m ranked vectors succeeds, averaged over n prompts.

    Parameters
    ----------
    success : Tensor of bool, (m, n) or (models, m, n)
        Whether each vector succeeds on each prompt, best-ranked vector first; ranked on other prompts. A prompt's rate
        is the mean over models, so the interval is for these models and other prompts.

    Raises
    ------
    ValueError
        If it is not of bool, with at least two prompts to resample.
    """
    _check(success)
    return _curve(success.double().cummax(-2).values)


def pass_at_k(success: Bool[Tensor, "*models m n"]) -> Curve:
    """Return how often one of k of m unordered tries succeeds, averaged over n prompts.

    Tries are samples at a temperature, or random vectors. The rate over all choices of k tries is
    1 − C(m − c, k) / C(m, k) where c succeed on a prompt. This is the unbiased pass@k of Chen et al. (2021),
    *Evaluating Large Language Models Trained on Code*, equation 1.

    Parameters
    ----------
    success : Tensor of bool, (m, n) or (models, m, n)
        Whether each try succeeds on each prompt; several models as in :func:`success_at_k`.

    Raises
    ------
    ValueError
        If it is not of bool, with at least two prompts to resample.
    """
    _check(success)
    m = success.shape[-2]
    k = np.arange(1, m + 1)[:, None]
    succeeding = success.sum(-2, keepdim=True).cpu().numpy()
    return _curve(torch.as_tensor(hypergeom.sf(0, m, succeeding, k)))


def _curve(rates: Float[Tensor, "*models m n"]) -> Curve:
    each = rates.cpu().reshape(-1, *rates.shape[-2:]).mean(0)
    array = each.numpy()
    n = array.shape[1]
    times_drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    low, high = np.quantile(times_drawn @ array.T / n, [0.025, 0.975], axis=0)
    mean = array.mean(1)
    alike = np.ptp(array, axis=1) == 0
    unseen = wilson(0, n)[1]
    low = np.where(alike, mean * (1 - unseen), low)
    high = np.where(alike, mean + (1 - mean) * unseen, high)
    return Curve(*(torch.as_tensor(part) for part in (mean, low, high)), each=each)


def _check(success: Tensor) -> None:
    if success.dtype != torch.bool or success.ndim not in (2, 3) or not success.numel() or success.shape[-1] < 2:
        raise ValueError(
            f"got {success.dtype} of shape {tuple(success.shape)}, expected bool (m, n) or (models, m, n): a row for "
            f"each vector or sample, a column for each of at least 2 prompts"
        )


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval around a rate of n tries, which unlike a bootstrap's has a width at 0 and at 1."""
    found = binomtest(round(rate * n), n).proportion_ci(method="wilson")
    return found.low, found.high


def share(verdicts: Sequence[bool]) -> Interval:
    """Return the fraction of verdicts that are true, with :func:`wilson`'s interval."""
    rate = sum(verdicts) / len(verdicts)
    return Interval(rate, *wilson(rate, len(verdicts)))
