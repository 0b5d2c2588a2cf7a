"""Steering vectors that a fit has to beat."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.maps.orthogonalise import normalise
from dctlib.maps.replay import activations


def random_vectors(count: int, d: int, *, norm: float, seed: int) -> Float[Tensor, "count d"]:
    """`count` directions drawn uniformly from the sphere, scaled to `norm`."""
    return norm * normalise(torch.randn(count, d, generator=torch.Generator().manual_seed(seed)))


def difference_of_means(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    towards: Sequence[str],
    away: Sequence[str],
    *,
    layer: int,
) -> Float[Tensor, " d"]:
    """Mean of h_layer at the last token of the texts `towards` less that of the texts `away` (Arditi et al. 2024).

    Raises
    ------
    ValueError
        If the layer is out of range, or either has no text.
    """

    def mean(texts: Sequence[str]) -> Tensor:
        return activations(model, tokenizer, texts, layer=layer, positions=1).mean(0)

    return mean(towards) - mean(away)
