"""What many steering vectors change: the next token's distribution."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.models.logits import compute_logits
from dctlib.steering.last_token import replay_last_token


@dataclass(frozen=True)
class Effects:
    """The effects of m steering vectors on the next token after each of n texts.

    Attributes
    ----------
    divergence : Tensor, (m, n)
        KL(steered ‖ clean) of the next token's distribution, in nats.
    token : Tensor, (m, n)
        Id of the most likely next token under the vector.
    clean : Tensor, (n,)
        Id of the most likely next token without steering.
    """

    divergence: Float[Tensor, "m n"]
    token: Int[Tensor, "m n"]
    clean: Int[Tensor, " n"]


def effects(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    vectors: Float[Tensor, "m d"],
    *,
    layer: int,
    progress: bool = True,
) -> Effects:
    """Compare the next token's distribution after each text with and without each vector, added at `layer`.

    Raises
    ------
    ValueError
        If there is no text or vector, a vector has another width, or the layer is out of range.
    """

    def read(residual: Tensor) -> Tensor:
        return compute_logits(model, residual).log_softmax(-1)

    def compare(steered: Tensor, clean: Tensor) -> Tensor:
        divergence = torch.sum(steered.exp() * (steered - clean), -1)
        tokens = [steered.argmax(-1), clean.argmax(-1).expand(len(steered), -1)]
        return torch.stack([divergence, *(each.to(divergence) for each in tokens)], -1)  # ids below 2²⁴ are exact

    found = replay_last_token(model, tokenizer, texts, vectors, read, compare=compare, layer=layer, progress=progress)
    return Effects(found[..., 0], found[..., 1].long(), found[0, :, 2].long())
