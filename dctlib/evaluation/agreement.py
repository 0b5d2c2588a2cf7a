"""Agreement of a judge with readers who labelled the same completions."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from dctlib.evaluation.statistics import RESAMPLES, Interval


def agreement(
    judged: Sequence[bool], labelled: Sequence[bool], requests: Sequence[int], *, seed: int = 0
) -> dict[str, Interval]:
    """Return precision, recall and Cohen's κ of a judge, with 95 % intervals over requests.

    The intervals are percentile bootstraps of 9,999 resamples. Completions of one request stay together in a resample,
    because a hard request is hard for every completion. A measure that is 0 / 0 counts as 0.

    Parameters
    ----------
    judged, labelled : sequence of bool
        What the judge says of each completion, and what readers say.
    requests : sequence of int
        The number of the request that each completion answers.

    Returns
    -------
    dict
        ``precision``, the share of what the judge affirms that readers affirm; ``recall``, the share of what readers
        affirm that the judge affirms; ``kappa``, (p − e) / (1 − e), where p is the share of completions on which they
        agree, and e the share expected by chance.

    Raises
    ------
    ValueError
        If the lengths differ, or there are fewer than two requests.
    """
    judge, readers = np.asarray(judged, dtype=bool), np.asarray(labelled, dtype=bool)
    numbers, groups = np.unique(np.asarray(requests), return_inverse=True)
    if not len(judge) == len(readers) == len(groups) or len(numbers) < 2:
        raise ValueError(
            f"got {len(judge)} verdicts, {len(readers)} labels and the requests of {len(groups)} completions, "
            f"{len(numbers)} of them different; expected equal lengths and at least 2 requests"
        )
    counts = np.zeros((len(numbers), 4), dtype=int)
    np.add.at(counts, (groups, 2 * judge.astype(int) + readers), 1)
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    measured, resampled = _measures(counts.sum(0)), _measures(counts[drawn].sum(1))
    intervals = {}
    for name, values in resampled.items():
        low, high = np.quantile(values, (0.025, 0.975))
        intervals[name] = Interval(float(measured[name]), float(low), float(high))
    return intervals


def _measures(counts: Int[np.ndarray, "*r 4"]) -> dict[str, Float[np.ndarray, "*r"]]:
    """Return the measures of counts: neither affirms, readers alone, the judge alone, both."""
    neither, readers, judge, both = np.moveaxis(counts, -1, 0)
    total = counts.sum(-1)
    agreed = (both + neither) / total
    chance = ((both + judge) * (both + readers) + (neither + judge) * (neither + readers)) / total**2
    ratios = {
        "precision": (both, both + judge),
        "recall": (both, both + readers),
        "kappa": (agreed - chance, 1 - chance),
    }
    return {name: _divide(above, below) for name, (above, below) in ratios.items()}


def _divide(above: Float[np.ndarray, "*r"], below: Float[np.ndarray, "*r"]) -> Float[np.ndarray, "*r"]:
    return np.divide(above, below, out=np.zeros(np.shape(above)), where=below > 0)
