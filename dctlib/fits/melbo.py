"""MELBO: steering vectors that maximise the change, one after another."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dctlib.maps.base import DifferentiableMap, check_finite, gaussian
from dctlib.maps.orthogonalise import normalise


@dataclass(frozen=True, eq=False)
class Directions:
    """Orthonormal directions, and how much the map makes of each.

    Attributes
    ----------
    V : Tensor, (k, d_source)
        Unit rows: :func:`melbo`'s in the order in which they were found, :func:`power_steering`'s by gain.
    gain : Tensor, (k,)
        ‖Δ(Rv)‖ of :func:`melbo`, in the units of the residual stream; ‖J v‖ of :func:`power_steering`, which for
        J at 0 estimates a singular value.
    """

    V: Float[Tensor, "k d_source"]
    gain: Float[Tensor, " k"]


def melbo(
    cmap: DifferentiableMap,
    *,
    num_vectors: int,
    input_scale: float,
    steps: int = 300,
    learning_rate: float = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> Directions:
    """Maximise ‖Δ(Rv)‖ over unit vectors v, one after another, each orthogonal to those before.

    This is Mack & Turner (2024), *Mechanistically Eliciting Latent Behaviors in Language Models*: projected gradient
    ascent by AMSGrad with their moments and number of steps. They average the norm over prompts; here Δ is averaged
    first, as everywhere in dctlib. A step takes two forward passes and a backward one.

    Parameters
    ----------
    cmap : DifferentiableMap
        The map Δ.
    num_vectors : int
        At most d_source.
    input_scale : float
        R, from :func:`dctlib.calibrate`.
    steps : int
        Of each vector.
    learning_rate : float
        About the angle, in radians, by which v turns in a step. Theirs, .001 for each coordinate of Rv, was near .01.
    seed : int
        Seed of the starts.

    Raises
    ------
    ValueError
        If an option is out of range, or the gradients are not finite.
    """
    _check(num_vectors, cmap.d_source, steps)
    if not 0 < input_scale < float("inf"):
        raise ValueError(f"got input_scale={input_scale}, expected a positive number; calibrate(cmap) finds one")
    generator, R = torch.Generator().manual_seed(seed), input_scale
    V = torch.empty(0, cmap.d_source, dtype=cmap.dtype, device=cmap.device)
    for _ in tqdm(range(num_vectors), desc=f"MELBO, {steps} steps each", disable=not progress):
        v = normalise(_outside(V, gaussian(cmap, 1, cmap.d_source, generator)))
        step_size = learning_rate / cmap.d_source**0.5
        optimiser = torch.optim.Adam([v], lr=step_size, betas=(0.9, 0.98), amsgrad=True, maximize=True)
        for _ in range(steps):
            gradient = check_finite(R * cmap.vjp(R * v, normalise(cmap(R * v))))  # of ‖Δ(Rv)‖
            v.grad = _outside(torch.cat([V, v]), gradient)  # in the tangent space of what is allowed
            optimiser.step()
            v.copy_(normalise(_outside(V, v)))
        V = torch.cat([V, v])
    return Directions(V, cmap(R * V).norm(dim=1))


def _outside(basis: Tensor, rows: Tensor) -> Tensor:
    """What is left of `rows` without their part in the span of the orthonormal rows of `basis`."""
    return rows - rows @ basis.T @ basis


def _check(num_vectors: int, most: int, rounds: int) -> None:
    if not 1 <= num_vectors <= most:
        raise ValueError(
            f"got num_vectors={num_vectors}, expected 1 to {most}: they are orthogonal, so widths bound them"
        )
    if rounds < 1:
        raise ValueError(f"got {rounds} steps or iterations, expected at least 1")
