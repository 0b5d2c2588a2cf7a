"""Answers to prompts, and how likely a model finds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from dctlib.models import pad_id


@dataclass(frozen=True)
class Example:
    """A prompt in chat format and the answer to learn; `ends` says whether the answer is complete."""

    prompt: str
    answer: str
    ends: bool


def padded(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """Tokens of prompts and answers padded on the right, the attention mask, and which tokens belong to answers."""
    prompts = [tokenizer.encode(example.prompt, add_special_tokens=False) for example in examples]
    ends = [[tokenizer.eos_token_id] if example.ends else [] for example in examples]
    answers = [
        tokenizer.encode(e.answer, add_special_tokens=False) + end for e, end in zip(examples, ends, strict=True)
    ]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens = torch.full((len(examples), length), pad_id(tokenizer))
    mask, is_answer = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        is_answer[row, len(prompt) : end] = True
    return tokens, mask, is_answer


def answer_loss(model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Float[Tensor, ""]:
    """Mean cross-entropy of all tokens of all answers."""
    losses, _ = _token_losses(model, tokenizer, examples)
    return losses.mean()


def surprise(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, batch_size: int = 50
) -> Float[Tensor, " n"]:
    """Mean −log p of a token of each answer, in nats: the logarithm of its perplexity. Infinite for an empty answer."""
    found = []
    for start in range(0, len(examples), batch_size):
        with torch.no_grad():
            losses, rows = _token_losses(model, tokenizer, examples[start : start + batch_size])
        count = len(examples[start : start + batch_size])
        total, tokens = (torch.zeros(count).index_add_(0, rows, x) for x in (losses, torch.ones_like(losses)))
        found.append(torch.where(tokens > 0, total / tokens, torch.inf))
    return torch.cat(found)


def _token_losses(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> tuple[Float[Tensor, " k"], Int[Tensor, " k"]]:
    """−log p of every token of every answer, and whose it is. Logits are computed at those tokens alone."""
    tokens, mask, is_answer = (part.to(model.device) for part in padded(tokenizer, examples))
    hidden = model.base_model(tokens, attention_mask=mask, use_cache=False).last_hidden_state
    predicts = is_answer[:, 1:]
    logits = model.get_output_embeddings()(hidden[:, :-1][predicts])
    losses = F.cross_entropy(logits.float(), tokens[:, 1:][predicts], reduction="none")
    return losses, predicts.nonzero()[:, 0]
