"""The likelihood of answers to prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.models.blocks import eager_attention, unwrap
from dctlib.models.chat import tokenize
from dctlib.models.logits import output_logits
from dctlib.models.packing import PromptTree, pack_prompts

_MOST_TOKENS = 512  # larger trees spend more on attention than they save, smaller ones share less


@dataclass(frozen=True)
class Example:
    """A prompt in chat format and its answer; `ends` states whether the answer is complete."""

    prompt: str
    answer: str
    ends: bool


def pack_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[tuple[PromptTree, list[int]]]:
    """Return examples, in order, as trees; with each tree, where the answer starts in each of its paths."""
    prompts = [tokenize(tokenizer, example.prompt)[0].tolist() for example in examples]
    answers = [tokenizer.encode(example.answer, add_special_tokens=False) for example in examples]
    answers = [[*a, tokenizer.eos_token_id] if e.ends else a for a, e in zip(answers, examples, strict=True)]
    rows = [torch.tensor([[*prompt, *answer]]) for prompt, answer in zip(prompts, answers, strict=True)]
    starts = iter(map(len, prompts))
    trees = pack_prompts(model, rows, most_tokens=_MOST_TOKENS)
    return [(tree, list(islice(starts, len(tree.paths)))) for tree in trees]


def answer_loss(model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of all tokens of all answers, in nats, differentiable."""
    return torch.cat(list(_token_losses(model, tokenizer, examples))).mean()


def token_nll(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[Float[Tensor, " tokens"]]:
    """Return −log p of every token of each answer, in nats."""
    with torch.no_grad():
        return list(_token_losses(model, tokenizer, examples))


def mean_nll(model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Float[Tensor, " n"]:
    """Return each answer's mean −log p of a token in nats, the logarithm of its perplexity; infinity if it is empty."""
    answers = token_nll(model, tokenizer, examples)
    return torch.stack([losses.mean() if len(losses) else losses.new_tensor(torch.inf) for losses in answers])


def _token_losses(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> Iterator[Float[Tensor, " k"]]:
    """Yield −log p of every token of each answer, with logits computed at those tokens alone."""
    with eager_attention(model):
        for tree, starts in pack_answers(model, tokenizer, examples):
            hidden = unwrap(model).base_model(**tree.arguments(model), use_cache=False).last_hidden_state[0]
            answers = [path[start:] for path, start in zip(tree.paths, starts, strict=True)]
            before = [path[start - 1 : -1] for path, start in zip(tree.paths, starts, strict=True)]
            logits = output_logits(model, hidden[torch.cat(before)])
            targets = tree.tokens[0, torch.cat(answers)].to(logits.device)
            yield from F.cross_entropy(logits, targets, reduction="none").split([len(answer) for answer in answers])
