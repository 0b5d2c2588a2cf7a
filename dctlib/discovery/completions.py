"""Completions of instructions under steering vectors, and which of them are fluent and new."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.evaluation.judges import is_repetitive, perplexity
from dctlib.evaluation.thoughts import answer_of
from dctlib.models.chat import Instruction, format_chat
from dctlib.steering.generation import generate_per_vector


@dataclass(frozen=True)
class SteeredCompletions:
    """Completions of n instructions, unsteered and under each of k vectors.

    Attributes
    ----------
    clean : list of str
        The n completions without steering.
    steered : dict
        Multiple of the vectors → for each of k vectors its n completions.
    perplexity : list of float
        Median perplexity, under the clean model, of each vector's completions at the first multiple.
    fluent : list of float
        Fraction of those completions that are fluent and new: of at most `max_perplexity`, not repetitive, and
        different from the completion without steering.
    """

    clean: list[str]
    steered: dict[float, list[list[str]]]
    perplexity: list[float]
    fluent: list[float]

    def select(self, rows: Sequence[int]) -> "SteeredCompletions":
        """Return the completions under some of the vectors, by their row."""
        return SteeredCompletions(
            self.clean,
            {strength: [completions[row] for row in rows] for strength, completions in self.steered.items()},
            [self.perplexity[row] for row in rows],
            [self.fluent[row] for row in rows],
        )


def complete_at_strengths(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[Instruction],
    clean: Sequence[str],
    vectors: Float[Tensor, "k d"],
    *,
    layer: int,
    strengths: Sequence[float],
    max_new_tokens: int,
    max_perplexity: float = 20.0,
    progress: bool = True,
    **chat: Any,
) -> SteeredCompletions:
    """Complete each instruction greedily under each vector at each strength.

    Parameters
    ----------
    instructions : sequence of str or of conversations
        In no chat format.
    clean : sequence of str
        Their completions without steering.
    vectors : Tensor, (k, d)
        Added at every position of `layer`, times each of `strengths`.
    max_perplexity : float
        Largest perplexity of a fluent completion under the clean model.
    **chat
        Options of :func:`dctlib.format_chat`, such as ``system``.
    """
    texts = format_chat(tokenizer, instructions, **chat)
    options: dict[str, Any] = {"layer": layer, "max_new_tokens": max_new_tokens, "progress": progress}
    steered = {
        strength: generate_per_vector(model, tokenizer, texts, strength * vectors, **options) for strength in strengths
    }
    judged = steered[strengths[0]]
    flat = [completion for completions in judged for completion in completions]
    measured = perplexity(model, tokenizer, [*instructions] * len(judged), flat, **chat)
    measured = measured.clamp(max=1e6).cpu().view(len(judged), -1)
    new = [
        [
            answer_of(completion) != answer_of(before) and not is_repetitive(completion)
            for completion, before in zip(each, clean, strict=True)
        ]
        for each in judged
    ]
    fluent = ((measured <= max_perplexity) & torch.tensor(new)).float().mean(1)
    return SteeredCompletions(list(clean), steered, measured.quantile(0.5, dim=1).tolist(), fluent.tolist())
