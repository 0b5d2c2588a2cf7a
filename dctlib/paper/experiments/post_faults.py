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
    """Return the first *columns* of the Vh that torch's SVD returns; its rows are the right singular vectors.

    Parameters
    ----------
    exact : Transcoder
        A linear fit with as many factors as coordinates.
    """
    if exact.V.shape[0] != exact.V.shape[1]:
        raise ValueError(f"got V of shape {tuple(exact.V.shape)}, expected a linear fit of all factors, a square V")
    return exact.V.T[:num_factors].contiguous()


def als_without_curvature(
    cmap: DifferentiableMap, *, num_factors: int, iterations: int, seed: int
) -> Float[Tensor, "m d_source"]:
    """Run Algorithm 2 with T2(·, v, v) and T2(u, v, ·) of the map's linear part, which become T1 v and T1ᵀ u.

    A linear map has no second-order information. The result is orthogonal iteration, which converges to the leading
    right singular vectors of the Jacobian.
    """
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(num_factors, cmap.d_source, generator=generator, dtype=cmap.dtype).to(cmap.device)
    zero = torch.zeros_like(V)
    for _ in range(iterations):
        V = orthonormal_rows(V)
        V = cmap.vjp(zero, cmap.jvp(zero, V))
    return normalise(V)


def pad_left_unmasked(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """Pad texts on the left to equal length with tokens that are attended to like any other."""
    lengths = [tokenize(tokenizer, text).shape[1] for text in texts]
    return [str(tokenizer.pad_token) * (max(lengths) - n) + text for text, n in zip(texts, lengths, strict=True)]
