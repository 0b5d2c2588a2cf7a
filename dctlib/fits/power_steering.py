"""Power steering: leading right singular vectors of the Jacobian."""

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dctlib.fits.melbo import check_counts
from dctlib.maps.base import DifferentiableMap, check_finite, gaussian
from dctlib.maps.orthogonalise import orthonormal_rows


def power_steering(
    cmap: DifferentiableMap,
    num_vectors: int = 16,
    *,
    input_scale: float = 0.0,
    iterations: int = 7,
    seed: int = 0,
    progress: bool = True,
) -> Float[Tensor, "k d_source"]:
    """Return leading right singular vectors of the Jacobian J by block power iteration on JᵀJ (Ayyub 2026).

    Seven iterations and the closing Rayleigh-Ritz step are 15 products of J or Jᵀ with each vector.

    Parameters
    ----------
    cmap : DifferentiableMap
        The map Δ.
    num_vectors : int
        k, at most min(d_source, d_target), the rank that J can have.
    input_scale : float
        With 0, J is the Jacobian of Δ at 0. Otherwise J of each vector is taken at `input_scale` times the vector, as
        in the exponential fit. A vector then has a sign, and the Rayleigh-Ritz step is left out.
    iterations : int
        The error falls as r^(2 · iterations), where r < 1 is the ratio of neighbouring singular values.
    seed : int
        Seed of the start.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Tensor, (k, d_source)
        Orthonormal rows, by decreasing ‖J v‖, which for J at 0 estimates a singular value. A singular vector has no
        sign, so try V and −V, at the length R of :func:`dctlib.calibrate`.

    Raises
    ------
    ValueError
        If an option is out of range, or the products are not finite.
    """
    check_counts(num_vectors, min(cmap.d_source, cmap.d_target), iterations)
    if not 0 <= input_scale < float("inf"):
        raise ValueError(f"got input_scale={input_scale}, expected 0 or a positive number, such as calibrate(cmap)")
    generator = torch.Generator().manual_seed(seed)
    V = orthonormal_rows(gaussian(cmap, num_vectors, cmap.d_source, generator))
    for _ in tqdm(range(iterations), desc=f"power iteration, {num_vectors} vectors", disable=not progress):
        theta = input_scale * V
        V = orthonormal_rows(check_finite(cmap.vjp(theta, cmap.jvp(theta, V))))  # V ← Q of QR(JᵀJ V)
    image = cmap.jvp(input_scale * V, V)
    if input_scale == 0:
        rotation = torch.linalg.svd(image, full_matrices=False).U  # Rayleigh-Ritz: singular vectors within the span
        return rotation.T @ V
    return V[image.norm(dim=1).argsort(descending=True)]
