"""The methods of Figure 1 of the post, and how far each scores above another."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jaxtyping import Float
from scipy.stats import binomtest

from dctlib._io import ROOT
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


@cache
def published_scores() -> dict[str, dict[int, dict[str, list[Any]]]]:
    """Return the scores of the post's shuffles: method → number of fit prompts → ``score`` and ``winner`` of each."""
    return yaml.safe_load((ROOT / "writeup" / "published_scores.yaml").read_text(encoding="utf-8"))


def published_differences() -> dict[str, Interval]:
    """Return :func:`paired_differences` of the post's scores, which are means over its test prompts."""
    scores = {
        method: {n: np.array(cell["score"])[:, None] for n, cell in by_n.items()}
        for method, by_n in published_scores().items()
    }
    return paired_differences(scores)


def published_winners(*, first: int = 8, vectors: int = 512) -> pd.DataFrame:
    """Return how often the post's best vector is one of the `first` directions of its fit.

    A fit without a sign gives both signs of half as many directions, and the vector i + `vectors` / 2 is the negation
    of i. If every vector were equally likely to win, the number of shuffles would be binomial.

    Returns
    -------
    DataFrame
        A row for each method, with columns ``shuffles``, ``among_first``, ``expected`` by chance, and ``p_value``, the
        chance of at least as many.
    """
    rows = {}
    for method, by_n in published_scores().items():
        directions = vectors if method == "exponential" else vectors // 2
        winners = [winner % directions for cell in by_n.values() for winner in cell["winner"]]
        among = sum(winner < first for winner in winners)
        chance = first / directions
        rows[method] = {
            "shuffles": len(winners),
            "among_first": among,
            "expected": len(winners) * chance,
            "p_value": float(binomtest(among, len(winners), chance, alternative="greater").pvalue),
        }
    return pd.DataFrame(rows).T
