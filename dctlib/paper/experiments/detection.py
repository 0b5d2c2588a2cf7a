"""Detectors of anomalous prompts: distances along the factors of a transcoder, and baselines."""

import math
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from dctlib.evaluation.anomaly import auroc, mahalanobis, projected_distance
from dctlib.evaluation.statistics import Interval, interval
from dctlib.fits.baselines import random_vectors

_FEWEST = 3  # organisms that an interval needs


def detector_scores(
    trusted: Float[Tensor, "n d"], live: Float[Tensor, "k d"], directions: Float[Tensor, "m d"], *, seed: int
) -> dict[str, Float[Tensor, " k"]]:
    """Return the anomaly score of each live prompt at one layer, by detector.

    h is the residual stream of a prompt. ``factors, distance`` is ‖V (h − mean of trusted h)‖, and ``factors,
    Mahalanobis`` is the Mahalanobis distance of V h from trusted prompts. ``random, …`` has as many random directions
    in place of V. ``residual, Mahalanobis`` is the Mahalanobis distance of h itself.

    Parameters
    ----------
    trusted, live : Tensor, (n, d) and (k, d)
        :func:`dctlib.maps.replay.activations` at the layer of the directions.
    directions : Tensor, (m, d)
        V at the source layer, or U at the target layer.
    seed : int
        Seed of the random directions.

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
    # Another seed, because the fit may have drawn its start from `seed`.
    random = random_vectors(*directions.shape, norm=1, seed=seed + 1_000_003)
    scores = {}
    for name, rows in {"factors": directions.to(trusted), "random": random.to(trusted)}.items():
        scores[f"{name}, distance"] = projected_distance(trusted, live, rows)
        scores[f"{name}, Mahalanobis"] = mahalanobis(trusted @ rows.T, live @ rows.T)
    return scores | {"residual, Mahalanobis": mahalanobis(trusted, live)}


def auroc_contrasts(
    clean: Float[Tensor, " n"], triggered: Float[Tensor, " n"], decoyed: Float[Tensor, " n"], *, seed: int = 0
) -> dict[str, Interval]:
    """Return the AUROC of one detector for each pair of clean, triggered and decoyed prompts.

    A detector of any odd phrase has a high AUROC on decoy against clean, and about 0.5 on trigger against decoy.
    """
    return {
        "trigger against clean": auroc(clean, triggered, seed=seed),
        "trigger against decoy": auroc(decoyed, triggered, seed=seed),
        "decoy against clean": auroc(clean, decoyed, seed=seed),
    }


def mean_over_organisms(aurocs: pd.DataFrame) -> pd.DataFrame:
    """Return the mean AUROC over organisms with its 95 % interval, which is NaN with fewer than three organisms.

    Parameters
    ----------
    aurocs : DataFrame
        Columns ``organism``, ``end``, ``detector``, ``contrast`` and ``mean``.

    Returns
    -------
    DataFrame
        Columns ``end``, ``detector``, ``contrast``, ``mean``, ``low`` and ``high``, in the order of first appearance.
    """
    keys = ["end", "detector", "contrast"]
    rows = []
    groups: Any = aurocs.groupby(keys, sort=False)["mean"]
    for key, group in groups:
        values = group.tolist()
        mean = interval(values) if len(values) >= _FEWEST else Interval(sum(values) / len(values), math.nan, math.nan)
        rows.append(dict(zip(keys, key, strict=True)) | vars(mean))
    return pd.DataFrame(rows, columns=[*keys, "mean", "low", "high"])


def difference_to_detector(aurocs: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return the mean AUROC of each detector less that of `reference` at the same layer, paired by organism.

    The columns are those of :func:`mean_over_organisms`.
    """
    keys = ["organism", "end", "contrast"]
    baseline = aurocs.loc[aurocs["detector"] == reference, [*keys, "mean"]]
    paired = aurocs[aurocs["detector"] != reference].merge(baseline, on=keys, suffixes=("", "_reference"))
    return mean_over_organisms(paired.assign(mean=paired["mean"] - paired["mean_reference"]))
