"""Completions that are sampled at a temperature."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from dctlib.steering.generation import generate_completions, in_lists


class _GumbelNoise(LogitsProcessor):
    """Logits over T plus Gumbel noise, whose largest is a sample of softmax(logits / T)."""

    def __init__(self, temperature: float, seed: int):
        self._temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Int[Tensor, "batch t"], scores: Float[Tensor, "batch v"]) -> Float[Tensor, "batch v"]:
        exponential = torch.empty(scores.shape).exponential_(generator=self._generator).to(scores.device)
        return scores.float() / self._temperature - exponential.log()


def sample_completions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    count: int,
    temperature: float = 1.0,
    max_new_tokens: int,
    seed: int = 0,
    progress: bool = True,
) -> list[list[str]]:
    """Return `count` sampled completions of every text: `count` lists, each in the order of `texts`.

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
    completions = generate_completions(
        model,
        tokenizer,
        [*texts] * count,
        max_new_tokens=max_new_tokens,
        processor=_GumbelNoise(temperature, seed),
        description="sampling",
        progress=progress,
    )
    return in_lists(completions, len(texts))
