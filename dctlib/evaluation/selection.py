"""Selection of steering vectors on validation prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.evaluation.judges import fraction_true
from dctlib.maps.orthogonalise import normalise
from dctlib.models.blocks import residual_width
from dctlib.models.chat import format_chat
from dctlib.steering.generation import generate_per_vector
from dctlib.steering.hooks import ablate
from dctlib.steering.scoring import Scores, score_each, score_texts


@dataclass(frozen=True)
class Selection:
    """The best of each set of candidate vectors, chosen on validation texts, on test texts beside the clean model.

    Attributes
    ----------
    validation : dict
        Label of a set → :class:`Scores` of all its vectors on the validation texts.
    best : dict
        Label → the chosen vector, (d,): ``"clean"``, zeros; for each set its label, the vector that
        :meth:`Scores.best` takes; and ``"<label>, score alone"``, the one with the highest mean difference.
    test : dict
        The same labels → one difference of logits for each test text.
    is_top1 : dict
        The same labels → the share of test texts after which the positive word is the most likely of all tokens.
    """

    validation: dict[str, Scores]
    best: dict[str, Float[Tensor, " d"]]
    test: dict[str, list[float]]
    is_top1: dict[str, float]


def select_and_test(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    candidates: Mapping[str, Float[Tensor, "m d"]],
    *,
    validation: Sequence[str],
    test: Sequence[str],
    layer: int,
    positive: str = "Sure",
    negative: str = "Sorry",
    progress: bool = True,
) -> Selection:
    """Rank every set of `candidates` on `validation`, as :func:`score_each` does, and score the best of each on `test`.

    Raises
    ------
    ValueError
        If a text is in both: what is ranked on is not reported.
    """
    if shared := set(validation) & set(test):
        raise ValueError(f"{len(shared)} texts are in both validation and test; split() makes disjoint sets")
    candidates = {label: vectors.cpu() for label, vectors in candidates.items()}
    everything = torch.cat(list(candidates.values()))  # at once: each prompt's prefix is run once
    options: Any = {"layer": layer, "positive": positive, "negative": negative, "progress": progress}
    scored = score_each(model, tokenizer, validation, everything, **options)
    sizes = [len(vectors) for vectors in candidates.values()]
    parts = zip(candidates, scored.logit_diff.split(sizes), scored.is_top1.split(sizes), strict=True)
    ranked = {label: Scores(difference, said) for label, difference, said in parts}
    best = {"clean": torch.zeros(residual_width(model))}
    for label, scores in ranked.items():
        best[label] = candidates[label][scores.best()]
        best[f"{label}, score alone"] = candidates[label][scores.best(say=0)]
    tested = score_each(model, tokenizer, test, torch.stack(list(best.values())), **options)
    differences, said = tested.logit_diff.tolist(), tested.is_top1.float().mean(1).tolist()
    return Selection(ranked, best, dict(zip(best, differences, strict=True)), dict(zip(best, said, strict=True)))


@dataclass(frozen=True, eq=False)
class Candidate:
    """A vector that scored high on validation requests, and the fraction of them that it made the model answer."""

    method: str
    layer: int
    multiplier: float
    vector: Float[Tensor, " d"]
    score: float
    success: float


def judge_top_candidates(
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
) -> list[Candidate]:
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
        scores = score_each(model, tokenizer, texts, everything, layer=layer, progress=progress).logit_diff.mean(1)
        sizes, chosen = [len(vectors) for vectors in candidates.values()], []
        for method, vectors, own in zip(candidates, everything.split(sizes), scores.split(sizes), strict=True):
            chosen += [(method, vectors[i], own[i].item()) for i in own.argsort(descending=True)[:count].tolist()]
        options = {"layer": layer, "max_new_tokens": max_new_tokens, "progress": progress}
        said = generate_per_vector(model, tokenizer, texts, torch.stack([vector for _, vector, _ in chosen]), **options)
        for (method, vector, score), answers in zip(chosen, said, strict=True):
            found.append(Candidate(method, layer, multiplier, vector, score, fraction_true(judge(requests, answers))))
    return found


def best_per_method(found: Sequence[Candidate]) -> dict[str, Candidate]:
    """Of each method the finalist with the highest success, and among equals the highest score."""
    best: dict[str, Candidate] = {}
    for finalist in found:
        held = best.setdefault(finalist.method, finalist)
        if (finalist.success, finalist.score) > (held.success, held.score):
            best[finalist.method] = finalist
    return best


def candidates_table(found: Sequence[Candidate]) -> pd.DataFrame:
    """All finalists, one row each: ``method``, ``source``, ``multiplier``, ``score`` and ``success``."""
    return pd.DataFrame(found).drop(columns="vector").rename(columns={"layer": "source"})


def top_k_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    vectors: Float[Tensor, "m d"],
    *,
    layer: int,
    count: int,
    progress: bool = True,
) -> Float[Tensor, "k d"]:
    """The `count` first of `vectors` by :meth:`dctlib.steering.scoring.Scores.ranking` on validation `requests`."""
    texts = format_chat(tokenizer, requests)
    scores = score_each(model, tokenizer, texts, vectors, layer=layer, progress=progress)
    return vectors[scores.ranking()[:count]]


@dataclass(frozen=True, eq=False)
class Addition:
    """A vector and where it is added.

    Attributes
    ----------
    layer : int
        To h_layer, at every position.
    vector : Tensor, (d,)
        At its length.
    """

    layer: int
    vector: Float[Tensor, " d"]


def best_added(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    directions: Sequence[Addition],
    *,
    lengths: Sequence[float],
    progress: bool = True,
) -> Addition:
    """Of `directions` at their own length and each of `lengths`, the best by :meth:`dctlib.steering.scoring.Scores.ranking`."""
    texts, tried, scored = format_chat(tokenizer, requests), [], []
    for of in directions:
        unit = normalise(of.vector[None])
        vectors = torch.cat([of.vector[None], *(length * unit for length in lengths)])
        tried += [Addition(of.layer, vector) for vector in vectors]
        scored.append(score_each(model, tokenizer, texts, vectors, layer=of.layer, progress=progress))
    together = Scores(torch.cat([of.logit_diff for of in scored]), torch.cat([of.is_top1 for of in scored]))
    return tried[together.best()]


def best_ablated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    directions: Sequence[Addition],
) -> Addition:
    """Of `directions`, the one without which the model scores highest on `requests`, whatever it says there."""
    texts, scores = format_chat(tokenizer, requests), []
    for of in directions:
        with ablate(model, of.vector):
            scores.append(score_texts(model, tokenizer, texts).mean().item())
    return directions[scores.index(max(scores))]
