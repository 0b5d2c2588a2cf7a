"""Damage of steering vectors: how far they change the next token in the model's own answers to harmless requests."""

import importlib.resources
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.maps.replay import capture, replay
from dctlib.models.blocks import eager_attention, get_blocks
from dctlib.models.chat import Instruction, format_chat
from dctlib.models.likelihood import Example, pack_answers
from dctlib.models.logits import compute_logits
from dctlib.steering.generation import generate_completions

_TOKENS = 2560  # replayed at once, over a batch of vectors
_LOGITS = 2**26  # computed at once: a quarter of a GiB


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


@torch.no_grad()
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
    blocks = list(get_blocks(model))[layer:]
    vectors = vectors.to(model.device)
    total, count = torch.zeros(len(vectors), dtype=torch.float64), 0
    with eager_attention(model), torch.compiler.set_stance("force_eager"):
        for tree, starts in pack_answers(model, tokenizer, examples):
            prompts = capture(model, tree, source=layer, target=layer + len(blocks))
            before = torch.cat([path[start - 1 : -1] for path, start in zip(tree.paths, starts, strict=True)])
            unsteered = _log_probabilities(model, replay(blocks, prompts, 0 * vectors[:1])[0, before])
            at_once = min(_TOKENS // tree.tokens.shape[1], _LOGITS // unsteered.numel())
            damages = []
            for batch in vectors.split(max(1, at_once)):
                steered = _log_probabilities(model, replay(blocks, prompts, batch)[:, before])
                damages.append(torch.sum(steered.exp() * (steered - unsteered), (1, 2)).double().cpu())
            total += torch.cat(damages)
            count += len(before)
    return (total / count).float()


def _log_probabilities(model: PreTrainedModel, hidden: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows v"]:
    return compute_logits(model, hidden).log_softmax(-1)
