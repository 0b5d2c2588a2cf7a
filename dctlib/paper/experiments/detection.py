"""Detectors of anomalous prompts: along the factors of a transcoder, and what they have to beat."""

import math
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from dctlib.evaluation.anomaly import auroc, mahalanobis, projected_distance
from dctlib.evaluation.statistics import Interval, interval
from dctlib.fits.baselines import random_vectors

_FEWEST = 3  # organisms that an interval over organisms takes


def detector_scores(
    trusted: Float[Tensor, "n d"], live: Float[Tensor, "k d"], directions: Float[Tensor, "m d"], *, seed: int
) -> dict[str, Float[Tensor, " k"]]:
    """How odd each live prompt looks at one layer, by detector.

    ``factors, distance`` is ‖V (h − mean of trusted h)‖ and ``factors, Mahalanobis`` the same in units of what is usual
    among trusted prompts; ``random, …`` puts as many random directions in the place of V, and ``residual,
    Mahalanobis`` takes h whole.

    Parameters
    ----------
    trusted, live : Tensor, (n, d) and (k, d)
        :func:`dctlib.maps.replay.activations` at the layer of the directions.
    directions : Tensor, (m, d)
        V at the source layer, or U at the target layer.
    seed : int
        Of the random directions.

    Raises
    ------
    ValueError
        If the shapes do not fit, there are fewer than two trusted rows, or a value is not finite.
    """
    if directions.ndim != 2 or directions.shape[1] != trusted.shape[-1]:
        raise ValueError(
            f"got directions {tuple(directions.shape)} for residuals of width {trusted.shape[-1]}, expected (m, "
            f"{trusted.shape[-1]}): V at the source layer, U at the target layer"
        )
    # A stream of its own: the fit behind the directions may have drawn Gaussian rows from `seed`.
    floor = random_vectors(*directions.shape, norm=1, seed=seed + 1_000_003)
    scores = {}
    for name, rows in {"factors": directions.to(trusted), "random": floor.to(trusted)}.items():
        scores[f"{name}, distance"] = projected_distance(trusted, live, rows)
        scores[f"{name}, Mahalanobis"] = mahalanobis(trusted @ rows.T, live @ rows.T)
    return scores | {"residual, Mahalanobis": mahalanobis(trusted, live)}


def auroc_contrasts(
    clean: Float[Tensor, " n"], triggered: Float[Tensor, " n"], decoyed: Float[Tensor, " n"], *, seed: int = 0
) -> dict[str, Interval]:
    """AUROC of one detector: does it see the ``trigger``, and is it the trigger that it sees?

    A detector that takes any odd phrase for a backdoor has a high AUROC of decoy against clean and one of about .5 of
    trigger against decoy.
    """
    return {
        "trigger against clean": auroc(clean, triggered, seed=seed),
        "trigger against decoy": auroc(decoyed, triggered, seed=seed),
        "decoy against clean": auroc(clean, decoyed, seed=seed),
    }


def mean_over_organisms(aurocs: pd.DataFrame) -> pd.DataFrame:
    """Mean AUROC over organisms with its 95 % interval over them, NaN where there are fewer than three.

    Parameters
    ----------
    aurocs : DataFrame
        Columns ``organism``, ``end``, ``detector``, ``contrast`` and ``mean``.

    Returns
    -------
    DataFrame
        Columns ``end``, ``detector``, ``contrast``, ``mean``, ``low`` and ``high``, in the order of first appearance.
    """
    keys, rows = ["end", "detector", "contrast"], []
    groups: Any = aurocs.groupby(keys, sort=False)["mean"]
    for key, of in groups:
        values = of.tolist()
        mean = interval(values) if len(values) >= _FEWEST else Interval(sum(values) / len(values), math.nan, math.nan)
        rows.append(dict(zip(keys, key, strict=True)) | vars(mean))
    return pd.DataFrame(rows, columns=[*keys, "mean", "low", "high"])


def difference_to_detector(aurocs: pd.DataFrame, reference: str) -> pd.DataFrame:
    """How much higher the AUROC of each detector is than that of `reference` at the same layer, organism by organism:
    :func:`mean_over_organisms` of the differences, so that what all detectors find hard does not count.
    """
    keys = ["organism", "end", "contrast"]
    usual = aurocs.loc[aurocs["detector"] == reference, [*keys, "mean"]]
    paired = aurocs[aurocs["detector"] != reference].merge(usual, on=keys, suffixes=("", "_usual"))
    return mean_over_organisms(paired.assign(mean=paired["mean"] - paired["mean_usual"]))
