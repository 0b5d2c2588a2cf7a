"""The methods of Figure 1 of the post, and how far each scores above another."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from dctlib.evaluation.statistics import Interval, paired_difference

METHODS = {
    "exponential": "exponential",
    "exponential_axes": "exponential, from axes",
    "quadratic": "quadratic",
    "linear_projected": "projected linear",
    "linear": "exact linear",
}
"""The methods that are fitted, by the names of parameters and results, in words. The post has no start on axes."""

COMPARISONS = (
    ("exponential", "quadratic"),
    ("exponential", "linear_projected"),
    ("exponential", "linear"),
    ("quadratic", "linear_projected"),
    ("linear_projected", "linear"),
)
"""Pairs of methods, the one first that the post finds better."""


def paired_differences(
    scores: Mapping[str, Mapping[int, Float[np.ndarray, "shuffles prompts"]]],
) -> dict[str, Interval]:
    """Return how far methods score above others: the mean difference, paired by shuffle and prompt, with its interval.

    A difference is first averaged over the numbers of fit prompts that both methods have.

    Parameters
    ----------
    scores : mapping
        Method → number of fit prompts → the score of its best vector in each shuffle, on each test prompt. Random
        vectors have the number 0 alone, and are compared at every one.

    Returns
    -------
    dict
        ``"exponential - quadratic"`` and so on for :data:`COMPARISONS`; ``"exponential - random"`` and so on; and
        ``"most - least"``, exponential fits of the most fit prompts against those of the fewest.
    """
    found = {}
    for better, worse in COMPARISONS:
        if shared := [n for n in scores.get(better, {}) if n in scores.get(worse, {})]:
            found[f"{better} - {worse}"] = paired_difference([(scores[better][n], scores[worse][n]) for n in shared])
    for method, by_n in scores.items():
        if method != "random" and "random" in scores:
            found[f"{method} - random"] = paired_difference([(each, scores["random"][0]) for each in by_n.values()])
    exponential = scores["exponential"]
    found["most - least"] = paired_difference([(exponential[max(exponential)], exponential[min(exponential)])])
    return found
