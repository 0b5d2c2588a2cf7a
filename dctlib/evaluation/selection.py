"""Selection of steering vectors on validation prompts, which are never the prompts of a reported result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

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


@dataclass(frozen=True, eq=False)
class SelectedVector:
    """A vector selected on validation texts, with its scores on test texts.

    Attributes
    ----------
    vector : Tensor, (d,)
        At its length, on the CPU.
    scores : list of float
        logit(positive) − logit(negative) after each test text.
    top1_rate : float
        Fraction of test texts after which the positive word is the most likely of all tokens.
    """

    vector: Float[Tensor, " d"]
    scores: list[float]
    top1_rate: float


@dataclass(frozen=True, eq=False)
class Selection:
    """The best vector of each set, selected on validation texts by two rules and scored on test texts.

    Attributes
    ----------
    validation : dict
        Label of a set → :class:`Scores` of all its vectors on the validation texts.
    clean : SelectedVector
        Zeros: the model without steering.
    best : dict
        Label → the vector that :meth:`Scores.best` takes.
    best_by_score : dict
        Label → the vector with the highest mean difference of logits, whatever the model then says.
    """

    validation: dict[str, Scores]
    clean: SelectedVector
    best: dict[str, SelectedVector]
    best_by_score: dict[str, SelectedVector]


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
    """Select the best vector of each set of `candidates` on `validation`, and score it on `test`.

    Parameters
    ----------
    candidates : mapping
        Label → vectors, (m, d), each at its length.
    validation, test : sequence of str
        Whole prompts, as for :func:`dctlib.steering.scoring.score_each`.

    Raises
    ------
    ValueError
        If a text is in both: what is ranked on is not reported.
    """
    shared = set(validation) & set(test)
    if shared:
        raise ValueError(f"{len(shared)} texts are in both validation and test; split() makes disjoint sets")
    sets = {label: vectors.cpu() for label, vectors in candidates.items()}
    sizes = [len(vectors) for vectors in sets.values()]
    score = partial(score_each, model, tokenizer, layer=layer, positive=positive, negative=negative, progress=progress)
    scores = score(validation, torch.cat(list(sets.values())))  # at once: each prompt is captured once
    parts = map(Scores, scores.logit_diff.split(sizes), scores.is_top1.split(sizes))
    ranked = dict(zip(sets, parts, strict=True))
    chosen = [torch.zeros(residual_width(model))]
    for label, found in ranked.items():
        chosen.append(sets[label][found.best()])
        chosen.append(sets[label][found.best(min_top1=0)])
    vectors = torch.stack(chosen)
    tested = score(test, vectors)
    rates = tested.is_top1.float().mean(1).tolist()
    clean, *best = map(SelectedVector, vectors, tested.logit_diff.tolist(), rates)
    return Selection(ranked, clean, dict(zip(sets, best[::2], strict=True)), dict(zip(sets, best[1::2], strict=True)))


@dataclass(frozen=True, eq=False)
class Candidate:
    """A steering vector, with its record on validation requests.

    Attributes
    ----------
    layer, vector
        The vector, (d,) at its length, is added to h_layer.
    method, multiplier
        What found it, and its length in units of the length at which it was found.
    score, success : float or None
        Mean logit(Sure) − logit(Sorry), and the fraction of requests answered, once measured.
    """

    layer: int
    vector: Float[Tensor, " d"]
    method: str = ""
    multiplier: float = 1.0
    score: float | None = None
    success: float | None = None

    def at_lengths(self, lengths: Sequence[float]) -> list["Candidate"]:
        """Return the candidate as it is, and at each of `lengths`."""
        unit = normalise(self.vector[None])[0]
        return [self, *(replace(self, vector=length * unit) for length in lengths)]


def rank_candidates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    candidates: Sequence[Candidate],
    *,
    min_top1: float = 0.5,
    progress: bool = True,
) -> list[Candidate]:
    """Return `candidates` with their scores on validation `requests`, the best first.

    The order is that of :meth:`dctlib.steering.scoring.Scores.ranking` with `min_top1`.
    """
    texts = format_chat(tokenizer, requests)
    found = []
    for layer, group in groupby(candidates, key=lambda candidate: candidate.layer):
        vectors = torch.stack([candidate.vector for candidate in group])
        found.append(score_each(model, tokenizer, texts, vectors, layer=layer, progress=progress))
    scores = Scores(torch.cat([each.logit_diff for each in found]), torch.cat([each.is_top1 for each in found]))
    means = scores.logit_diff.mean(1).tolist()
    return [replace(candidates[i], score=means[i]) for i in scores.ranking(min_top1=min_top1)]


def judge_top_candidates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    vectors: Mapping[str, Float[Tensor, "m d"]],
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
    vectors : mapping
        Method → its vectors, at multiplier 1.
    judge : callable
        ``judge(requests, completions)``: whether each completion answers its request.

    Returns
    -------
    list of Candidate
        By multiplier, then by method, then by score, the highest first.
    """
    texts = format_chat(tokenizer, requests)
    judged = []
    for multiplier in multipliers:
        tried = [
            Candidate(layer, multiplier * row, method, multiplier) for method, rows in vectors.items() for row in rows
        ]
        ranked = rank_candidates(model, tokenizer, requests, tried, min_top1=0, progress=progress)
        top = []
        for method in vectors:
            top += [candidate for candidate in ranked if candidate.method == method][:count]
        steered = torch.stack([candidate.vector for candidate in top])
        completions = generate_per_vector(
            model, tokenizer, texts, steered, layer=layer, max_new_tokens=max_new_tokens, progress=progress
        )
        for candidate, answers in zip(top, completions, strict=True):
            judged.append(replace(candidate, success=fraction_true(judge(requests, answers))))
    return judged


def best_per_method(judged: Sequence[Candidate]) -> dict[str, Candidate]:
    """Return the candidate of each method with the highest success, and among equals the highest score."""
    methods = dict.fromkeys(candidate.method for candidate in judged)
    ordered = sorted(judged, key=lambda candidate: (candidate.success, candidate.score), reverse=True)
    return {method: next(candidate for candidate in ordered if candidate.method == method) for method in methods}


def best_ablated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    directions: Sequence[Candidate],
) -> Candidate:
    """Return the direction under whose ablation the model scores highest on `requests`, whatever it then says."""
    texts = format_chat(tokenizer, requests)

    def ablated_score(direction: Candidate) -> float:
        with ablate(model, direction.vector):
            return score_texts(model, tokenizer, texts).mean().item()

    return max(directions, key=ablated_score)
