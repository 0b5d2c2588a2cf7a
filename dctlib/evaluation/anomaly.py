"""Mechanistic anomaly detection: distances of a prompt's residual from those of trusted prompts, and their AUROC."""

import numpy as np
import torch
from jaxtyping import Float
from sklearn.covariance import LedoitWolf
from torch import Tensor

from dctlib.evaluation.statistics import RESAMPLES, Interval


def projected_distance(
    trusted: Float[Tensor, "n d"], live: Float[Tensor, "k d"], directions: Float[Tensor, "m d"]
) -> Float[Tensor, " k"]:
    """Return ‖V (h − mean of trusted h)‖ for every row h of `live`: its distance along a transcoder's directions.

    ``mahalanobis(trusted @ V.T, live @ V.T)`` is the distance in units of the covariance of trusted rows along V.

    Parameters
    ----------
    trusted, live : Tensor, (n, d) and (k, d)
        :func:`dctlib.maps.replay.activations` at the layer of the directions.
    directions : Tensor, (m, d)
        V at the source layer, or U at the target layer.
    """
    _check(trusted, live)
    return ((live - trusted.mean(0)) @ directions.to(live).T).norm(dim=1)


def mahalanobis(trusted: Float[Tensor, "n d"], live: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
    """Return the Mahalanobis distance of every row of `live` from the mean of `trusted`.

    The covariance of `trusted` is shrunk towards a multiple of the identity (Ledoit & Wolf 2004), because there may be
    fewer rows than columns.

    Raises
    ------
    ValueError
        If there are fewer than two trusted rows, the widths differ, or a value is not finite.
    """
    _check(trusted, live)
    gaussian = LedoitWolf().fit(trusted.double().cpu().numpy())
    return torch.as_tensor(gaussian.mahalanobis(live.double().cpu().numpy())).sqrt()


def auroc(clean: Float[Tensor, " n"], anomalous: Float[Tensor, " k"], *, seed: int = 0) -> Interval:
    """Return the area under the receiver operating characteristic, with its 95 % interval.

    This is how often an anomalous score is above a clean one, where ties count half. The interval is a percentile
    bootstrap of both sets, with 9,999 resamples.

    Raises
    ------
    ValueError
        If a set has fewer than two scores.
    """
    if min(len(clean), len(anomalous)) < 2:
        raise ValueError(f"got {len(clean)} clean and {len(anomalous)} anomalous scores, expected at least 2 of each")
    x = anomalous.double().cpu()[:, None]
    y = clean.double().cpu()
    above = (x > y).double() + (x == y).double() / 2  # (k, n), whose mean is Mann and Whitney's U over k n
    generator = np.random.default_rng(seed)
    rows, columns = (generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) for n in above.shape)
    counted = ((rows @ above.numpy()) * columns).sum(1)  # halves and whole numbers, so exact
    low, high = np.quantile(counted / above.numel(), [0.025, 0.975])
    return Interval(above.mean().item(), float(low), float(high))


def _check(trusted: Tensor, live: Tensor) -> None:
    if trusted.ndim != 2 or live.ndim != 2 or trusted.shape[1] != live.shape[1] or len(trusted) < 2:
        raise ValueError(
            f"got trusted {tuple(trusted.shape)} and live {tuple(live.shape)}, expected (n, d) and (k, d) with n of at "
            f"least 2"
        )
