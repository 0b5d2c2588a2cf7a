"""Choosing steering vectors by what they make a model say, where a score alone deceives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.generate import complete_each
from dctlib.judges import rate
from dctlib.prompts import format_chat
from dctlib.rank import score_each


@dataclass(frozen=True, eq=False)
class Finalist:
    """A vector that scored high on validation requests, and the fraction of them that it made the model answer."""

    method: str
    layer: int
    multiplier: float
    vector: Float[Tensor, " d"]
    score: float
    success: float


def finalists(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    candidates: Mapping[str, Float[Tensor, "m d"]],
    judge: Callable[[Sequence[str], Sequence[str]], list[bool]],
    *,
    layer: int,
    multipliers: Sequence[float],
    count: int,
    max_new_tokens: int,
    progress: bool = True,
) -> list[Finalist]:
    """Judge the completions of the `count` vectors of each method and multiplier that score highest.

    Parameters
    ----------
    requests : sequence of str
        Validation instructions, in no chat format.
    candidates : mapping
        Method → its vectors, at multiplier 1.
    judge : callable
        ``judge(requests, completions)``: whether each completion answers its request.
    """
    texts, found = format_chat(tokenizer, requests), []
    for multiplier in multipliers:
        everything = multiplier * torch.cat(list(candidates.values()))
        scores = score_each(model, tokenizer, texts, everything, layer=layer, progress=progress).difference.mean(1)
        sizes, chosen = [len(vectors) for vectors in candidates.values()], []
        for method, vectors, own in zip(candidates, everything.split(sizes), scores.split(sizes), strict=True):
            chosen += [(method, vectors[i], own[i].item()) for i in own.argsort(descending=True)[:count].tolist()]
        options = {"layer": layer, "max_new_tokens": max_new_tokens, "progress": progress}
        said = complete_each(model, tokenizer, texts, torch.stack([vector for _, vector, _ in chosen]), **options)
        for (method, vector, score), answers in zip(chosen, said, strict=True):
            found.append(Finalist(method, layer, multiplier, vector, score, rate(judge(requests, answers))))
    return found


def best_of_each(found: Sequence[Finalist]) -> dict[str, Finalist]:
    """Of each method the finalist with the highest success, and among equals the highest score."""
    best: dict[str, Finalist] = {}
    for finalist in found:
        held = best.setdefault(finalist.method, finalist)
        if (finalist.success, finalist.score) > (held.success, held.score):
            best[finalist.method] = finalist
    return best


def scan(found: Sequence[Finalist]) -> pd.DataFrame:
    """All finalists, one row each: ``method``, ``source``, ``multiplier``, ``score`` and ``success``."""
    return pd.DataFrame(found).drop(columns="vector").rename(columns={"layer": "source"})
