"""Steering vectors that a fit has to beat."""

import torch
from jaxtyping import Float
from torch import Tensor

from dctlib.orthogonalise import normalise


def random_vectors(count: int, d: int, *, norm: float, seed: int) -> Float[Tensor, "count d"]:
    """`count` directions drawn uniformly from the sphere, scaled to `norm`."""
    return norm * normalise(torch.randn(count, d, generator=torch.Generator().manual_seed(seed)))
