"""The pool of a search: candidate directions from several methods, each with the name of its source."""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dctlib.fits.baselines import random_vectors
from dctlib.fits.calibration import calibrate
from dctlib.fits.power_steering import power_steering
from dctlib.fits.solvers import fit_exponential, fit_linear
from dctlib.maps.base import DifferentiableMap
from dctlib.maps.orthogonalise import normalise

_UNSIGNED = 4  # directions of each method that leaves the sign open; both signs are candidates
_RANDOM = 16
_DIRECTIONS = 8  # for calibration: R to within a tenth suffices, because each survivor gets its own length

RANDOM = "random"
"""The source of the control: random directions, which are searched like all others."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Candidate directions of one slice.

    Attributes
    ----------
    directions : Tensor, (m, d)
        Unit rows, float32 on the CPU, no two of them equal.
    sources : list of str
        The method that each row came from.
    input_scale : float
        R of :func:`dctlib.calibrate`, the length at which candidates are read first.
    """

    directions: Float[Tensor, "m d"]
    sources: list[str]
    input_scale: float

    def __len__(self) -> int:
        return len(self.directions)

    @property
    def controls(self) -> list[int]:
        """The rows of random directions."""
        return [row for row, source in enumerate(self.sources) if source == RANDOM]


def find_candidates(
    cmap: DifferentiableMap, num_factors: int, *, nonlinearity: float = 0.5, iterations: int = 10, seed: int = 0
) -> Pool:
    """Return the candidates of exponential DCT, power steering and projected linear DCT, and 16 random directions.

    Parameters
    ----------
    cmap : DifferentiableMap
        The map Δ.
    num_factors : int
        Factors of the exponential fit. The other two methods add four directions each, in both signs.
    nonlinearity : float
        λ, which sets R.
    iterations : int
        Of the exponential fit.
    seed : int
        Seed of the calibration and of every fit.

    Raises
    ------
    ValueError
        As :func:`dctlib.calibrate` and the fits.
    """
    R = calibrate(cmap, nonlinearity=nonlinearity, num_directions=_DIRECTIONS, seed=seed)
    few = min(_UNSIGNED, cmap.d_source, cmap.d_target)
    exponential = fit_exponential(cmap, num_factors, input_scale=R, iterations=iterations, seed=seed, progress=False)
    powers = power_steering(cmap, few, seed=seed, progress=False)
    linear = fit_linear(cmap, few, projections=32, seed=seed, progress=False)
    found = {
        "exponential": exponential.V,
        "power steering": torch.cat([powers, -powers]),
        "projected linear": torch.cat([linear.V, -linear.V]),
        RANDOM: random_vectors(_RANDOM, cmap.d_source, norm=1.0, seed=seed),
    }
    directions = torch.cat([normalise(rows.cpu().float()) for rows in found.values()])
    sources = [name for name, rows in found.items() for _ in rows]
    # Rows that are only close stay, because their effects may differ.
    first = pd.DataFrame(directions.numpy()).drop_duplicates().index.tolist()
    return Pool(directions[first], [sources[row] for row in first], R)
