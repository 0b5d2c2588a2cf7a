"""Steering vectors that a fit has to beat."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.maps.orthogonalise import normalise
from dctlib.maps.replay import activations


def random_vectors(count: int, d: int, *, norm: float, seed: int) -> Float[Tensor, "count d"]:
    """Draw `count` directions uniformly from the sphere, and scale them to `norm`."""
    return norm * normalise(torch.randn(count, d, generator=torch.Generator().manual_seed(seed)))


def difference_of_means(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    towards: Sequence[str],
    away: Sequence[str],
    *,
    layer: int,
) -> Float[Tensor, " d"]:
    """Return the mean of h_layer at the last token of the texts `towards`, less that of `away` (Arditi et al. 2024).

    Parameters
    ----------
    towards, away : sequence of str
        Whole prompts (see :func:`dctlib.format_chat`).
    layer : int
        As in Hugging Face's ``hidden_states``: the input of block `layer`.

    Returns
    -------
    Tensor, (d,)
        In the units of the residual stream, float32 on the CPU.

    Raises
    ------
    ValueError
        If the layer is out of range, or either has no text.
    """

    def mean(texts: Sequence[str]) -> Tensor:
        return activations(model, tokenizer, texts, layer=layer, positions=1).mean(0)

    return mean(towards) - mean(away)
