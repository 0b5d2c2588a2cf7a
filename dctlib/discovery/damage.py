"""Damage of steering vectors: how far they change the next token in the model's own answers to harmless requests."""

import importlib.resources
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.models.chat import Instruction, format_chat
from dctlib.models.likelihood import Example, pack_answers
from dctlib.models.logits import compute_logits
from dctlib.steering.generation import generate_completions
from dctlib.steering.last_token import replay_at


def everyday_questions() -> list[str]:
    """Return 24 harmless instructions of our own, on which damage is measured unless others are given."""
    return importlib.resources.files("dctlib.discovery").joinpath("benign.txt").read_text(encoding="utf-8").splitlines()


def unsteered_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[Instruction],
    *,
    max_new_tokens: int = 16,
    **chat: Any,
) -> list[Example]:
    """Return each instruction in chat format with the beginning of the model's greedy answer.

    An answer without text is its end token alone.

    Raises
    ------
    ValueError
        If no answer has a token.
    """
    texts = format_chat(tokenizer, instructions, **chat)
    answers = generate_completions(model, tokenizer, texts, max_new_tokens=max_new_tokens, progress=False)
    can_end = tokenizer.eos_token_id is not None
    if not can_end and not any(answers):
        raise ValueError(
            f"the model answers none of {len(texts)} harmless requests, and its tokenizer has no end token, expected "
            f"text to measure damage on; pass other requests as `benign`"
        )
    pairs = zip(texts, answers, strict=True)
    return [Example(text, answer, ends=can_end and not answer.strip()) for text, answer in pairs]


def measure_damage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    vectors: Float[Tensor, "k d"],
    *,
    layer: int,
) -> Float[Tensor, " k"]:
    """Return the mean KL(steered ‖ unsteered) of the next token over all tokens of the answers, in nats.

    The answers are given, whatever the steered model would say (teacher forcing). Blocks below `layer` run once for all
    vectors.

    Parameters
    ----------
    examples : sequence of Example
        Prompts and answers, see :func:`unsteered_answers`.
    vectors : Tensor, (k, d)
        Each is added to h_layer at every position. k may be 0.

    Raises
    ------
    ValueError
        If the model cannot be replayed from `layer` on, or a logit is not finite.
    """
    if not len(vectors):
        return torch.zeros(0)

    def read(residual: Tensor) -> Tensor:
        return compute_logits(model, residual).log_softmax(-1)

    def divergence(steered: Tensor, unsteered: Tensor) -> Tensor:
        return torch.sum(steered.exp() * (steered - unsteered), (1, 2)).double()

    positions = [
        (tree, torch.cat([path[start - 1 : -1] for path, start in zip(tree.paths, starts, strict=True)]))
        for tree, starts in pack_answers(model, tokenizer, examples)
    ]
    total = sum(replay_at(model, positions, vectors, read, compare=divergence, layer=layer))
    return torch.as_tensor(total / sum(len(each) for _, each in positions)).float()
