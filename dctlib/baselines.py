"""Steering vectors that a fit has to beat."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.causal_map import capture
from dctlib.models import check_layer, replaying
from dctlib.orthogonalise import normalise
from dctlib.prompt_tree import plant
from dctlib.prompts import tokenize


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
    check_layer(model, layer)

    def mean(texts: Sequence[str]) -> Tensor:
        if isinstance(texts, str) or not texts:
            raise ValueError(f"got texts={texts!r}, expected at least one prompt in a list")
        with replaying(model):
            trees = plant(model, [tokenize(tokenizer, text) for text in texts])
            runs = [capture(model, tree, source=layer, target=layer + 1) for tree in trees]
        return torch.cat([run.hidden[0, run.last()].float().cpu() for run in runs]).mean(0)

    return mean(towards) - mean(away)
