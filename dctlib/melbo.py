"""Steering vectors without a transcoder: the original MELBO, and power steering, its linear approximation."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dctlib.differentiable_map import DifferentiableMap, finite, gaussian
from dctlib.orthogonalise import normalise, orthonormal_rows


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
            gradient = finite(R * cmap.vjp(R * v, normalise(cmap(R * v))))  # of ‖Δ(Rv)‖
            v.grad = _outside(torch.cat([V, v]), gradient)  # in the tangent space of what is allowed
            optimiser.step()
            v.copy_(normalise(_outside(V, v)))
        V = torch.cat([V, v])
    return Directions(V, cmap(R * V).norm(dim=1))


def power_steering(
    cmap: DifferentiableMap,
    *,
    num_vectors: int,
    input_scale: float = 0.0,
    iterations: int = 7,
    seed: int = 0,
    progress: bool = True,
) -> Directions:
    """Leading right singular vectors of the Jacobian J by block power iteration on JᵀJ (Ayyub 2026, *Power Steering*).

    Seven iterations and the closing Rayleigh-Ritz step are 15 products of J or Jᵀ with each vector. A singular
    vector has no sign: try V and −V.

    Parameters
    ----------
    cmap : DifferentiableMap
        The map Δ.
    num_vectors : int
        At most min(d_source, d_target), the rank that J can have.
    input_scale : float
        With 0, J is that of Δ at 0. Otherwise it is taken anew for each vector at `input_scale` times the vector, as
        in the exponential fit; a vector then has a sign, and Rayleigh and Ritz's rotation no meaning.
    iterations : int
        The error falls with the ratio of neighbouring singular values to twice this power.
    seed : int
        Seed of the start.

    Raises
    ------
    ValueError
        If an option is out of range, or the products are not finite.
    """
    _check(num_vectors, min(cmap.d_source, cmap.d_target), iterations)
    if not 0 <= input_scale < float("inf"):
        raise ValueError(f"got input_scale={input_scale}, expected 0 or a positive number, such as calibrate(cmap)")
    generator = torch.Generator().manual_seed(seed)
    V = orthonormal_rows(gaussian(cmap, num_vectors, cmap.d_source, generator))
    for _ in tqdm(range(iterations), desc=f"power iteration, {num_vectors} vectors", disable=not progress):
        at = input_scale * V
        V = orthonormal_rows(finite(cmap.vjp(at, cmap.jvp(at, V))))
    image = cmap.jvp(input_scale * V, V)
    if input_scale == 0:
        rotation, gain, _ = torch.linalg.svd(image, full_matrices=False)
        return Directions(rotation.T @ V, gain)
    order = image.norm(dim=1).argsort(descending=True)
    return Directions(V[order], image[order].norm(dim=1))


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
