"""The input scale R: how long a steering vector must be before the map stops being linear."""

import math
from functools import cache
from typing import Any

import torch
from scipy.optimize import toms748

from dctlib.maps.base import DifferentiableMap
from dctlib.maps.orthogonalise import normalise

_DOUBLINGS = 40


def calibrate(cmap: DifferentiableMap, *, nonlinearity: float = 0.5, num_directions: int = 30, seed: int = 0) -> float:
    """Return R at which the non-linear part of Δ(Rθ) is `nonlinearity` times its linear part.

    Over random unit directions v, R solves sqrt(mean‖Δ(Rv) − R·T1 v‖² / mean‖R·T1 v‖²) = λ, the post's
    "Calibration Procedure for Choosing R". The search doubles or halves R from a tenth of the residual's typical
    norm until it brackets the first crossing. A root finder then closes in on it.

    Parameters
    ----------
    cmap : DifferentiableMap
        The map Δ.
    nonlinearity : float
        λ, .5 in the post. A smaller value keeps R, and so the steering vectors, closer to where the map is linear.
    num_directions : int
        Directions averaged over; 30 in the post.
    seed : int
        Seed of the directions.

    Returns
    -------
    float
        R, in the units of the residual stream: the length of a steering vector.

    Raises
    ------
    ValueError
        If no scale has this non-linearity: the map is linear or constant, saturates or overflows first, or rounding
        hides its linear part.
    """
    if not nonlinearity > 0 or num_directions < 1:
        raise ValueError(f"got nonlinearity={nonlinearity}, num_directions={num_directions}, expected both above 0")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_directions, cmap.d_source, generator=generator, dtype=torch.float64)
    directions = normalise(directions).to(cmap.device, cmap.dtype)
    linear = cmap.jvp(torch.zeros_like(directions), directions)
    if not torch.isfinite(linear).all():
        raise ValueError("the map's Jacobian at 0 is not finite; try dtype='float32'")
    if not linear.norm() > 0:
        raise ValueError("the map's Jacobian at 0 vanishes along random directions, so it has no R; try another slice")

    @cache  # because the root finder evaluates the bracket's ends again
    def excess(log_scale: float) -> float:
        scale = math.exp(log_scale)
        ratio = (cmap(scale * directions) / scale - linear).norm() / linear.norm()
        return ratio.item() - nonlinearity if torch.isfinite(ratio) else math.inf

    far = math.log(cmap.scale / 10)
    too_linear = excess(far) < 0
    for _ in range(_DOUBLINGS):
        near, far = far, far + (math.log(2) if too_linear else -math.log(2))
        if (excess(far) < 0) != too_linear:
            break
    else:
        raise ValueError(_no_scale(cmap, nonlinearity, too_linear))
    low, high = sorted((near, far))
    while not math.isfinite(excess(high)):
        middle = (low + high) / 2
        if high - low < 1e-6:
            raise ValueError(
                f"beyond R={math.exp(low):.3g} this map is not finite, and up to there it is less than "
                f"{nonlinearity:g} non-linear; try dtype='float32' or a smaller nonlinearity"
            )
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    root: Any = toms748(excess, low, high, xtol=1e-4)
    return math.exp(root)


def check_input_scale(input_scale: float) -> float:
    """Return R, or raise ValueError if it is not a positive number."""
    if not 0 < input_scale < float("inf"):
        raise ValueError(f"got input_scale={input_scale}, expected a positive number; calibrate(cmap) finds one")
    return float(input_scale)


def _no_scale(cmap: DifferentiableMap, nonlinearity: float, too_linear: bool) -> str:
    if too_linear:
        return (
            f"no scale R up to {cmap.scale / 10 * 2**_DOUBLINGS:.2g} makes this map {nonlinearity:g} non-linear: it is "
            f"linear, or saturates below that; try a smaller nonlinearity or a deeper slice"
        )
    return (
        f"this map is more than {nonlinearity:g} non-linear at every scale R down to "
        f"{cmap.scale / 10 / 2**_DOUBLINGS:.2g}: rounding may drown its linear part; try dtype='float32'"
    )
