"""Maps whose factors are known, to measure what a fit recovers."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dctlib.maps.function import FunctionMap
from dctlib.maps.nonlinearity import Activation, activate
from dctlib.maps.orthogonalise import normalise


@dataclass(frozen=True, eq=False)
class SyntheticMap:
    """The map Δ(θ) = T1 θ + Σ_l α_l σ(⟨v_l, θ⟩) u_l with unit u_l, v_l drawn uniformly from the sphere.

    Attributes
    ----------
    U, V : Tensor, (k, d)
        The planted directions.
    alpha : Tensor, (k,)
        Their weights, evenly spaced from 1.5 to 0.5.
    cmap : FunctionMap
        The map Δ.
    """

    U: Float[Tensor, "k d"]
    V: Float[Tensor, "k d"]
    alpha: Float[Tensor, " k"]
    cmap: FunctionMap


def synthetic_map(
    count: int,
    d: int,
    *,
    activation: Activation = "exponential",
    linear: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> SyntheticMap:
    """Return a map with `count` planted factors in `d` dimensions, to measure what a fit recovers.

    Random directions in high dimension are nearly orthogonal, the incoherence under which recovery is proved.

    Parameters
    ----------
    activation : {"linear", "quadratic", "exponential"}
        σ of the planted factors.
    linear : float
        Typical norm of the rows of an added Gaussian linear part T1; 0 adds none.
    seed : int
        Seed of the factors and of T1.
    """
    # Another seed, because calibration and fits draw Gaussian rows from `seed`, which would be the planted ones.
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    U = normalise(torch.randn(count, d, generator=generator, dtype=dtype))
    V = normalise(torch.randn(count, d, generator=generator, dtype=dtype))
    alpha = torch.linspace(1.5, 0.5, count, dtype=dtype)
    T1 = linear * d**-0.5 * torch.randn(d, d, generator=generator, dtype=dtype) if linear else None

    def function(theta: Tensor) -> Tensor:
        change = (activate(theta @ V.T, activation) * alpha) @ U
        return change if T1 is None else change + theta @ T1.T

    return SyntheticMap(U, V, alpha, FunctionMap(function, d_source=d, d_target=d, dtype=dtype))
