"""Scores under single directions, and under their aggregates: the mean and the first singular direction."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.evaluation.statistics import interval
from dctlib.fits.compare import similarity
from dctlib.maps.orthogonalise import normalise
from dctlib.steering.hooks import ablate
from dctlib.steering.scoring import score_each, score_texts, score_vectors


@dataclass(frozen=True)
class AggregateScores:
    """Mean test scores under each of k directions and under their aggregates.

    Attributes
    ----------
    scores : list of float
        The score under each direction.
    average, max : float
        The mean and the maximum of `scores`.
    v_avg, v_svd : float
        The scores under the mean direction, and under the first right singular direction.
    v_svd_negated : float or None
        The score under the singular direction with the other sign. None for ablation, where signs do not matter.
    intervals : dict
        ``average``, ``max``, ``v_avg`` and ``v_svd`` → low and high, the 95 % interval over test texts.
    condition_number, mean_abs_cosine, sd_abs_cosine : float
        From :func:`dctlib.fits.compare.similarity`.
    """

    scores: list[float]
    average: float
    max: float
    v_avg: float
    v_svd: float
    v_svd_negated: float | None
    intervals: dict[str, list[float]]
    condition_number: float
    mean_abs_cosine: float
    sd_abs_cosine: float


def qualifying_vectors(scores: Sequence[float], threshold: float) -> list[int]:
    """Return the numbers of the vectors that score at least `threshold`, best first; at least the best two."""
    order = sorted(range(len(scores)), key=lambda number: -scores[number])
    return order[: max(2, sum(score >= threshold for score in scores))]


def aggregates(rows: Float[Tensor, "k d"]) -> Float[Tensor, "2 d"]:
    """Return the mean direction of unit rows, and the first right singular direction of their matrix, of any sign."""
    return torch.stack([normalise(rows.mean(0, keepdim=True))[0], torch.linalg.svd(rows, full_matrices=False).Vh[0]])


def add_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Float[Tensor, "k d"],
    *,
    layer: int,
    norm: float,
    validation: Sequence[str],
    test: Sequence[str],
) -> AggregateScores:
    """Score `test` texts with each direction and each aggregate added at `layer`, at length `norm` (Table 3).

    The singular direction has the sign that scores higher on `validation`.
    """
    mean, singular = aggregates(rows)
    signs = torch.stack([singular, -singular])
    sign = int(score_vectors(model, tokenizer, validation, norm * signs, layer=layer).argmax())
    vectors = norm * torch.stack([*rows, mean, signs[sign], signs[1 - sign]])
    *scores, negated = score_each(model, tokenizer, test, vectors, layer=layer).logit_diff
    return _aggregate_scores(torch.stack(scores), rows, negated.mean().item())


def ablate_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Float[Tensor, "k d"],
    *,
    test: Sequence[str],
    description: str = "ablating directions",
) -> AggregateScores:
    """Score `test` texts with each direction and each aggregate ablated (Tables 4 and 5)."""
    directions = tqdm([*rows, *aggregates(rows)], desc=description)
    return _aggregate_scores(score_ablated(model, tokenizer, directions, test), rows)


def score_ablated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directions: Iterable[Float[Tensor, " d"]],
    texts: Sequence[str],
    **words: str,
) -> Float[Tensor, "k n"]:
    """Score `texts` with each direction ablated. `words` are those of :func:`dctlib.steering.scoring.score_texts`."""
    scores = []
    for direction in directions:
        with ablate(model, direction):
            scores.append(score_texts(model, tokenizer, texts, **words))
    return torch.stack(scores)


def _aggregate_scores(
    scores: Float[Tensor, "k+2 n"], rows: Float[Tensor, "k d"], negated: float | None = None
) -> AggregateScores:
    """Summarise scores on n texts: one row for each direction in `rows`, then the mean and the singular direction."""
    *each, v_avg, v_svd = scores.mean(1).tolist()
    best = each.index(max(each))
    resampled = {"average": scores[:-2].mean(0), "max": scores[best], "v_avg": scores[-2], "v_svd": scores[-1]}
    intervals = {}
    for name, per_text in resampled.items():
        found = interval(per_text.tolist())
        intervals[name] = [found.low, found.high]
    average = sum(each) / len(each)
    return AggregateScores(each, average, max(each), v_avg, v_svd, negated, intervals, **vars(similarity(rows)))
