"""Directions that unlock a model, one by one and together: as their mean, and as their first singular direction."""

from collections.abc import Sequence
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
    """Scores under k directions, one at a time, and under what aggregates them.

    Attributes
    ----------
    scores : list of float
        Under each.
    average, max : float
        Of those.
    v_avg, v_svd : float
        Under their mean, and under the first right singular direction of their matrix.
    v_svd_negated : float or None
        Under that with the other sign, where signs matter.
    intervals : dict
        ``average``, ``max``, ``v_avg`` and ``v_svd`` → low and high, the 95 % interval over test texts.
    condition_number, mean_abs_cosine, sd_abs_cosine : float
        How alike they are (see :func:`dctlib.fits.compare.similarity`).
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
    """Numbers of the vectors that score at least `threshold`, the best first; of the best two, if fewer do."""
    order = sorted(range(len(scores)), key=lambda number: -scores[number])
    return order[: max(2, sum(score >= threshold for score in scores))]


def aggregates(rows: Float[Tensor, "k d"]) -> Float[Tensor, "2 d"]:
    """The mean direction of unit rows, and the first right singular direction of their matrix, whose sign is free."""
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
    """Mean test scores with each direction added at `layer`, with their aggregates, all of one length (Table 3).

    The singular direction has the sign that scores higher on `validation` texts.
    """
    mean, singular = aggregates(rows)
    signs = torch.stack([singular, -singular])
    sign = int(score_vectors(model, tokenizer, validation, norm * signs, layer=layer).argmax())
    vectors = norm * torch.stack([*rows, mean, signs[sign], signs[1 - sign]])
    *scores, negated = score_each(model, tokenizer, test, vectors, layer=layer).logit_diff
    return _together(torch.stack(scores), rows, negated.mean().item())


def ablate_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Float[Tensor, "k d"],
    *,
    test: Sequence[str],
    description: str = "ablating directions",
) -> AggregateScores:
    """Mean test scores with each direction ablated, and with their aggregates ablated (Tables 4 and 5)."""
    scores = []
    for direction in tqdm([*rows, *aggregates(rows)], desc=description):
        with ablate(model, direction):
            scores.append(score_texts(model, tokenizer, test))
    return _together(torch.stack(scores), rows)


def _together(
    scores: Float[Tensor, "k+2 n"], rows: Float[Tensor, "k d"], negated: float | None = None
) -> AggregateScores:
    *each, v_avg, v_svd = scores.mean(1).tolist()
    shown = {"average": scores[:-2].mean(0), "max": scores[each.index(max(each))], "v_avg": scores[-2]}
    found = {name: interval(of.tolist()) for name, of in (shown | {"v_svd": scores[-1]}).items()}
    around = {name: [of.low, of.high] for name, of in found.items()}
    return AggregateScores(
        each, sum(each) / len(each), max(each), v_avg, v_svd, negated, around, **vars(similarity(rows))
    )
