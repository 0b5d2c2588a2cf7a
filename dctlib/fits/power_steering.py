"""Power steering: leading right singular vectors of the Jacobian."""

import torch
from tqdm import tqdm

from dctlib.fits.melbo import Directions, _check
from dctlib.maps.base import DifferentiableMap, check_finite, gaussian
from dctlib.maps.orthogonalise import orthonormal_rows


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
        V = orthonormal_rows(check_finite(cmap.vjp(at, cmap.jvp(at, V))))
    image = cmap.jvp(input_scale * V, V)
    if input_scale == 0:
        rotation, gain, _ = torch.linalg.svd(image, full_matrices=False)
        return Directions(rotation.T @ V, gain)
    order = image.norm(dim=1).argsort(descending=True)
    return Directions(V[order], image[order].norm(dim=1))
