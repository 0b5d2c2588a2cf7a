"""Faults of the post's published code, reproduced for notebooks/replication_audit.ipynb."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dctlib.fits.transcoder import Transcoder
from dctlib.maps.base import DifferentiableMap
from dctlib.maps.orthogonalise import normalise, orthonormal_rows
from dctlib.models.chat import tokenize


def columns_of_vh(exact: Transcoder, num_factors: int) -> Float[Tensor, "m d"]:
    """Return the first *columns* of the Vh that torch's SVD returns. Its *rows* are the right singular vectors.

    Parameters
    ----------
    exact : Transcoder
        A linear fit with as many factors as coordinates.
    """
    _check_square(exact)
    return exact.V.T[:num_factors].contiguous()


def projected_columns_of_vh(
    exact: Transcoder, num_factors: int, *, projections: int = 32, seed: int = 0
) -> Float[Tensor, "m d"]:
    """Return the first columns of the full Vh of W·T1, where Algorithm 1′ takes the first rows.

    W·T1 has `projections` rows. LAPACK adds the further rows of the full Vh, most of each column, to make
    the basis complete and orthonormal. The columns therefore lie close to coordinate axes.

    Parameters
    ----------
    exact : Transcoder
        A linear fit with as many factors as coordinates, from which T1 = Σ α u vᵀ is made again.
    projections, seed
        Rows of the Gaussian W, and its seed.
    """
    _check_square(exact)
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(projections, exact.U.shape[1], generator=generator)
    T1 = (exact.alpha * exact.U.T) @ exact.V
    Vh = torch.linalg.svd(W.to(T1) @ T1, full_matrices=True).Vh
    return Vh.T[:num_factors].contiguous()


def _check_square(exact: Transcoder) -> None:
    if exact.V.shape[0] != exact.V.shape[1]:
        raise ValueError(f"got V of shape {tuple(exact.V.shape)}, expected a linear fit of all factors, a square V")


def als_without_curvature(
    cmap: DifferentiableMap, *, num_factors: int, iterations: int, seed: int
) -> Float[Tensor, "m d_source"]:
    """Run Algorithm 2 with T1 v in place of T2(·, v, v), and T1ᵀ u in place of T2(u, v, ·).

    The published code differentiates the linear part of the map, which has no second-order information. The result is
    orthogonal iteration, which converges to the leading right singular vectors of the Jacobian.
    """
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(num_factors, cmap.d_source, generator=generator, dtype=cmap.dtype).to(cmap.device)
    zero = torch.zeros_like(V)
    for _ in range(iterations):
        V = orthonormal_rows(V)
        V = cmap.vjp(zero, cmap.jvp(zero, V))
    return normalise(V)


def pad_left_unmasked(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """Pad texts on the left to equal length, with tokens that no attention mask hides."""
    lengths = [tokenize(tokenizer, text).shape[1] for text in texts]
    return [str(tokenizer.pad_token) * (max(lengths) - n) + text for text, n in zip(texts, lengths, strict=True)]
