"""Mechanistic anomaly detection: how far a prompt's residuals are from those of trusted prompts."""

import numpy as np
import torch
from jaxtyping import Float
from sklearn.covariance import LedoitWolf
from torch import Tensor

from dctlib.evaluation.statistics import Interval

_RESAMPLES = 9_999


def projected_distance(
    trusted: Float[Tensor, "n d"], live: Float[Tensor, "k d"], directions: Float[Tensor, "m d"]
) -> Float[Tensor, " k"]:
    """‖V (h − mean of trusted h)‖ for every row h of `live`: how far it moved along the directions of a transcoder.

    For a distance in units of what is usual along each, use ``mahalanobis(trusted @ V.T, live @ V.T)``: the
    log-likelihood under a Gaussian falls with it.

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
    """Distance of every row of `live` from the mean of `trusted`, in units of its covariance.

    The covariance is shrunk towards a multiple of the identity (Ledoit & Wolf 2004), for there may be fewer rows than
    columns.

    Raises
    ------
    ValueError
        If there are fewer than two trusted rows, the widths differ, or a value is not finite.
    """
    _check(trusted, live)
    gaussian = LedoitWolf().fit(trusted.double().cpu().numpy())
    return torch.as_tensor(gaussian.mahalanobis(live.double().cpu().numpy())).sqrt()


def auroc(clean: Float[Tensor, " n"], anomalous: Float[Tensor, " k"], *, seed: int = 0) -> Interval:
    """How often an anomalous score is above a clean one, ties counting half, with its 95 % interval.

    This is the area under the receiver operating characteristic. The interval resamples both sets (percentile
    bootstrap, 9,999 resamples).

    Raises
    ------
    ValueError
        If a set has fewer than two scores.
    """
    if min(len(clean), len(anomalous)) < 2:
        raise ValueError(f"got {len(clean)} clean and {len(anomalous)} anomalous scores, expected at least 2 of each")
    x, y = anomalous.double().cpu()[:, None], clean.double().cpu()
    above = (x > y).double() + (x == y).double() / 2  # (k, n), whose mean is Mann and Whitney's U
    generator = np.random.default_rng(seed)
    rows, columns = (generator.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) for n in above.shape)
    counted = ((rows @ above.numpy()) * columns).sum(1)  # halves and whole numbers, so exact
    low, high = np.quantile(counted / above.numel(), [0.025, 0.975])
    return Interval(above.mean().item(), float(low), float(high))


def _check(trusted: Tensor, live: Tensor) -> None:
    if trusted.ndim != 2 or live.ndim != 2 or trusted.shape[1] != live.shape[1] or len(trusted) < 2:
        raise ValueError(
            f"got trusted {tuple(trusted.shape)} and live {tuple(live.shape)}, expected (n, d) and (k, d) with n of at "
            f"least 2"
        )
