"""Answers drawn at a temperature, from a generator of their own."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from dctlib.generate import complete


class _Gumbel(LogitsProcessor):
    """The largest of logits / T plus Gumbel noise is a sample of softmax(logits / T), so greedy decoding samples."""

    def __init__(self, temperature: float, seed: int):
        self._temperature, self._generator = temperature, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Int[Tensor, "batch t"], scores: Float[Tensor, "batch v"]) -> Float[Tensor, "batch v"]:
        exponential = torch.empty(scores.shape).exponential_(generator=self._generator).to(scores.device)
        return scores.float() / self._temperature - exponential.log()


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    count: int,
    temperature: float = 1.0,
    max_new_tokens: int,
    seed: int = 0,
    progress: bool = True,
) -> list[list[str]]:
    """Draw `count` completions of every text: a list of `count` lists, each in the order of `texts`.

    Parameters
    ----------
    temperature : float
        1 for the model's own distribution.
    seed : int
        On one machine, the same seed gives the same completions.

    Raises
    ------
    ValueError
        If there is no text, or the count or temperature is not above 0.
    """
    if isinstance(texts, str) or not texts or count < 1 or not temperature > 0:
        raise ValueError(
            f"got {len(texts)} texts, count={count}, temperature={temperature}, expected a list and both above 0"
        )
    options: Any = {"processor": _Gumbel(temperature, seed), "description": "sampling", "progress": progress}
    drawn = complete(model, tokenizer, [*texts] * count, max_new_tokens=max_new_tokens, **options)
    return [drawn[first : first + len(texts)] for first in range(0, len(drawn), len(texts))]
