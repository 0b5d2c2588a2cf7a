"""MELBO: steering vectors that maximise ‖Δ(Rv)‖, found one after another."""

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dctlib.fits.calibration import check_input_scale
from dctlib.maps.base import DifferentiableMap, check_finite, gaussian
from dctlib.maps.orthogonalise import normalise


def melbo(
    cmap: DifferentiableMap,
    num_vectors: int = 16,
    *,
    input_scale: float,
    steps: int = 300,
    learning_rate: float = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> Float[Tensor, "k d_source"]:
    """Return unit vectors v that maximise ‖Δ(Rv)‖, found one after another, each orthogonal to those before.

    This is Mack & Turner (2024), *Mechanistically Eliciting Latent Behaviors in Language Models*: projected gradient
    ascent by AMSGrad with their moments and number of steps. They average the norm over prompts. Here Δ is averaged
    first, as everywhere in dctlib; with a map of ``reduction="concatenate"``, squared norms are summed. A step takes
    two forward passes and one backward pass.

    Parameters
    ----------
    cmap : DifferentiableMap
        The map Δ.
    num_vectors : int
        k, at most d_source.
    input_scale : float
        R, from :func:`dctlib.calibrate`.
    steps : int
        Gradient steps for each vector.
    learning_rate : float
        Approximate angle, in radians, by which v turns in a step. Theirs, .001 for each coordinate of Rv, is near .01.
    seed : int
        Seed of the starts.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Tensor, (k, d_source)
        Orthonormal rows, in the order in which they were found. Steer with ``input_scale`` times a row.

    Raises
    ------
    ValueError
        If an option is out of range, or the gradients are not finite.
    """
    check_counts(num_vectors, cmap.d_source, steps)
    R = check_input_scale(input_scale)
    generator = torch.Generator().manual_seed(seed)
    V = torch.empty(0, cmap.d_source, dtype=cmap.dtype, device=cmap.device)
    for _ in tqdm(range(num_vectors), desc=f"MELBO, {steps} steps each", disable=not progress):
        v = normalise(_reject(gaussian(cmap, 1, cmap.d_source, generator), V))
        step_size = learning_rate / cmap.d_source**0.5
        optimiser = torch.optim.Adam([v], lr=step_size, betas=(0.9, 0.98), amsgrad=True, maximize=True)
        for _ in range(steps):
            gradient = check_finite(R * cmap.vjp(R * v, normalise(cmap(R * v))))  # of ‖Δ(Rv)‖
            v.grad = _reject(gradient, torch.cat([V, v]))  # the part tangent to the sphere and orthogonal to V
            optimiser.step()
            v.copy_(normalise(_reject(v, V)))
        V = torch.cat([V, v])
    return V


def check_counts(num_vectors: int, most: int, rounds: int) -> None:
    """Raise ValueError unless `num_vectors` is from 1 to `most` and `rounds` at least 1."""
    if not 1 <= num_vectors <= most:
        raise ValueError(
            f"got num_vectors={num_vectors}, expected 1 to {most}: vectors are orthogonal, so the width bounds them"
        )
    if rounds < 1:
        raise ValueError(f"got {rounds} steps or iterations, expected at least 1")


def _reject(rows: Tensor, basis: Tensor) -> Tensor:
    """Return rows less their projection on the span of `basis`, whose rows are orthonormal."""
    return rows - rows @ basis.T @ basis
