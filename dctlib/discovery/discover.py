"""From a fitted slice to vectors worth reading: measured, told apart, and made to speak."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.evaluation.judges import is_repetitive, perplexity, truncate
from dctlib.fits.baselines import random_vectors
from dctlib.fits.compare import cosine_clusters
from dctlib.fits.solvers import fit_exponential, fit_linear, fit_quadratic
from dctlib.fits.transcoder import Transcoder
from dctlib.maps.causal import CausalMap
from dctlib.models.chat import format_chat
from dctlib.runs.cache import cached_fit
from dctlib.steering.effects import change_norm_by_layer, effects
from dctlib.steering.generation import generate_completions, generate_per_vector
from dctlib.steering.scoring import score_vectors

Method = Literal["exponential", "quadratic", "linear"]


def fit_method(
    method: Method,
    folder: str | Path,
    cmap: CausalMap,
    *,
    num_factors: int,
    iterations: int,
    input_scale: float,
    seed: int,
) -> Transcoder:
    """A fit of the kind that is named, remembered in `folder`, of Δ(Rθ) for R = `input_scale` whatever the kind.

    Linear and quadratic fits are made at scale 1; their α takes R, or R², so that they mean the same and know how long
    their steering vectors are.
    """
    settings = {"num_factors": num_factors, "iterations": iterations, "seed": seed}
    if method == "exponential":
        return cached_fit(folder, fit_exponential, cmap, input_scale=input_scale, **settings)
    if method == "quadratic":
        dct, growth = cached_fit(folder, fit_quadratic, cmap, **settings), input_scale**2
    else:
        dct, growth = cached_fit(folder, fit_linear, cmap, num_factors=num_factors), input_scale
    return replace(dct, alpha=growth * dct.alpha, input_scale=input_scale)


def measure_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cmap: CausalMap,
    dct: Transcoder,
    vectors: Float[Tensor, "k d"],
    texts: Sequence[str],
    *,
    layer: int,
    words: tuple[str, str] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """What each vector does, one row each, with no target word needed.

    Parameters
    ----------
    vectors : Tensor, (k, d)
        Those of ``dct.steering_vectors(R)``.
    texts : sequence of str
        Whole prompts that were not fitted.
    words : (str, str), optional
        A positive and a negative one-token word: adds a column ``score``.

    Returns
    -------
    DataFrame
        ``vector``, its row; ``alpha``; ``change``, the length of Δ(vector) at the target layer; ``divergence``, the
        mean KL(steered ‖ clean) of the next token in nats; ``next``, the token that comes first most often; ``score``.
    """
    found = effects(model, tokenizer, texts, vectors, layer=layer, progress=progress)
    table = pd.DataFrame({"vector": range(len(vectors))})
    table["alpha"] = dct.alpha.repeat(len(vectors) // len(dct)).tolist()
    table["change"] = cmap(vectors).norm(dim=1).tolist()
    table["divergence"] = found.divergence.mean(1).tolist()
    table["next"] = tokenizer.batch_decode(found.token.mode(1).values[:, None])
    if words:
        positive, negative = words
        options = {"positive": positive, "negative": negative, "progress": progress}
        table["score"] = score_vectors(model, tokenizer, texts, vectors, layer=layer, **options).tolist()
    return table


def rank_and_cluster(
    table: pd.DataFrame, vectors: Float[Tensor, "k d"], *, by: str, cosine: float = 0.5
) -> pd.DataFrame:
    """Rows of `table`, highest `by` first, with a column ``alike``: vectors that point one way share its number.

    Equals stand in the order of their ``divergence``, where it was measured.
    """
    if by not in table:
        raise ValueError(f"got rank_by={by!r}, expected one of {', '.join(table.select_dtypes('number'))}")
    ranked = table.sort_values([by, *({"divergence"} & set(table) - {by})], ascending=False)
    return ranked.assign(alike=cosine_clusters(vectors[ranked["vector"].tolist()], cosine=cosine))


@dataclass(frozen=True)
class SteeredCompletions:
    """What a model says.

    Attributes
    ----------
    clean : list of str
        Without steering, to each of n instructions.
    steered : dict
        Multiple of the vectors → for each of k vectors its n completions.
    perplexity : list of float
        Median perplexity, under the clean model, of each vector's completions at the first multiple.
    fluent : list of float
        Fraction of those completions that are fluent, of at most `max_perplexity` and not repetitive, and not what the
        model says anyway.
    """

    clean: list[str]
    steered: dict[float, list[list[str]]]
    perplexity: list[float]
    fluent: list[float]

    def of(self, rows: Sequence[int]) -> "SteeredCompletions":
        """What it says under some of the vectors."""
        steered = {strength: [said[row] for row in rows] for strength, said in self.steered.items()}
        columns = ([column[row] for row in rows] for column in (self.perplexity, self.fluent))
        return SteeredCompletions(self.clean, steered, *columns)


def complete_at_strengths(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    clean: Sequence[str],
    vectors: Float[Tensor, "k d"],
    *,
    layer: int,
    strengths: Sequence[float],
    max_new_tokens: int,
    max_perplexity: float = 20.0,
    progress: bool = True,
) -> SteeredCompletions:
    """Complete each instruction under each vector at each strength.

    Parameters
    ----------
    clean : sequence of str
        What the model says without any.
    """
    texts, options = format_chat(tokenizer, instructions), {"max_new_tokens": max_new_tokens, "progress": progress}
    steered = {
        strength: generate_per_vector(model, tokenizer, texts, strength * vectors, layer=layer, **options)
        for strength in strengths
    }
    first = steered[strengths[0]]
    flat = [answer for said in first for answer in said]
    found = perplexity(model, tokenizer, [*instructions] * len(first), flat).clamp(max=1e6).cpu().view(len(first), -1)
    new = [[a != before and not is_repetitive(a) for a, before in zip(said, clean, strict=True)] for said in first]
    median = found.quantile(0.5, dim=1).tolist()
    fluent = ((found <= max_perplexity) & torch.tensor(new)).float().mean(1).tolist()
    return SteeredCompletions(list(clean), steered, median, fluent)


@dataclass(frozen=True, eq=False)
class Discovery:
    """What a fit found, measured on instructions that it was not fitted to.

    Attributes
    ----------
    dct : Transcoder
        With a factor for each vector: both signs of a linear or quadratic fit.
    ranked : DataFrame
        What :func:`rank_and_cluster` gives: all vectors, the most interesting first. Beside the columns of :func:`measure_vectors` it
        has ``fluent`` and ``perplexity``, see :class:`SteeredCompletions`.
    floor : float
        The largest ``divergence`` of as many random vectors of the same length.
    shown : list of int
        The first vectors of clusters, one each.
    reading : Reading
        What those make the model say, at every strength.
    growth : Tensor, (m, blocks + 1)
        Of all vectors in the order of `ranked`, see :func:`dctlib.steering.effects.change_norm_by_layer`.
    """

    dct: Transcoder
    ranked: pd.DataFrame
    floor: float
    shown: list[int]
    reading: SteeredCompletions
    growth: Float[Tensor, "m depths"]

    def readings(self, *, characters: int) -> pd.DataFrame:
        """The rows of `ranked` that are shown, with their first completion, cut."""
        said = next(iter(self.reading.steered.values()))
        rows = self.ranked.set_index("vector").loc[self.shown]
        return rows.assign(says=[truncate(each[0], characters) for each in said]).reset_index()

    def summary(self, *, characters: int) -> dict[str, Any]:
        """Counts, and the readings, for a notebook's results."""
        divergence, alike, fluent = (self.ranked[name].tolist() for name in ("divergence", "alike", "fluent"))
        return {
            "of": len(self.ranked),
            "floor": self.floor,
            "above_floor": sum(each > self.floor for each in divergence),
            "clusters": len(set(alike)),
            "fluent": sum(each >= 0.5 for each in fluent),
            "readings": self.readings(characters=characters).to_dict("records"),
        }


def discover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cmap: CausalMap,
    dct: Transcoder,
    instructions: Sequence[str],
    *,
    layer: int,
    norm: float,
    rank_by: str = "fluent",
    words: tuple[str, str] | None = None,
    shown: int = 12,
    strengths: Sequence[float] = (1.0,),
    max_new_tokens: int = 24,
    seed: int = 0,
    progress: bool = True,
) -> Discovery:
    """Measure and read every vector of a fit on held-out instructions, rank them, and show the first of each cluster.

    An effect alone deceives: the vectors that change the next token most are those that break the model. So by default
    they are ranked by how often they make it say something fluent that it does not say anyway.

    Parameters
    ----------
    cmap : CausalMap
        What `dct` was fitted to.
    instructions : sequence of str
        User turns, in no chat format, that were not fitted.
    layer, norm : int, float
        Where vectors are added, and R, their length.
    rank_by, words
        A column of the result's `ranked`, and the words of its ``score``.
    shown : int
        Clusters of which the first vector is shown.
    strengths : sequence of float
        Multiples of `norm` to read those at. All vectors are ranked at the first.
    seed : int
        Of the random vectors to compare with.
    """
    vectors, texts = dct.steering_vectors(norm), format_chat(tokenizer, instructions)
    options: dict[str, Any] = {"layer": layer, "words": words, "progress": progress}
    table = measure_vectors(model, tokenizer, cmap, dct, strengths[0] * vectors, texts, **options)
    speaking: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": progress}
    asked = (model, tokenizer, instructions, generate_completions(model, tokenizer, texts, **speaking))
    speaking["layer"] = layer
    everything = complete_at_strengths(*asked, vectors, strengths=strengths[:1], **speaking)
    table = table.assign(fluent=everything.fluent, perplexity=everything.perplexity)
    ranked = rank_and_cluster(table, vectors, by=rank_by)
    chance = random_vectors(len(vectors), cmap.d_source, norm=strengths[0] * norm, seed=seed)
    floor = effects(model, tokenizer, texts, chance, layer=layer, progress=progress).divergence.mean(1).max().item()
    first = ranked.drop_duplicates("alike").head(shown)["vector"].tolist()
    reading = everything.of(first)
    if strengths[1:]:
        others = complete_at_strengths(*asked, vectors[first], strengths=strengths[1:], **speaking)
        reading = replace(reading, steered=reading.steered | others.steered)
    lengths = change_norm_by_layer(
        model, tokenizer, texts, strengths[0] * vectors[ranked["vector"].tolist()], layer=layer
    )
    signed = dct if len(dct) == len(vectors) else dct.with_negations()
    return Discovery(signed, ranked, floor, first, reading, lengths)
