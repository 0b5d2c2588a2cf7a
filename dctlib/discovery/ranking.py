"""Measure what each vector of a transcoder does on held-out instructions, rank the vectors, and cluster them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.discovery.completions import SteeredCompletions, complete_at_strengths
from dctlib.evaluation.judges import truncate
from dctlib.fits.baselines import random_vectors
from dctlib.fits.compare import cosine_clusters
from dctlib.fits.transcoder import Transcoder
from dctlib.maps.causal import CausalMap
from dctlib.models.chat import Instruction, format_chat
from dctlib.steering.effects import change_norm_by_layer, effects
from dctlib.steering.generation import generate_completions, generate_per_vector
from dctlib.steering.scoring import score_vectors

MEASUREMENT_VERSION = 2
"""Part of the key of remembered measurements: raise it with any change that alters :func:`measure_vectors`' results."""


@dataclass(frozen=True, eq=False)
class Measurements:
    """Measurements of k vectors on n held-out instructions.

    Attributes
    ----------
    columns : dict of str to list
        A value a vector: ``vector``, its number; ``alpha``; ``change``, the length of Δ(vector) at the target layer;
        ``divergence``, the mean KL(steered ‖ clean) of the next token in nats; ``next``, the most frequent next token;
        ``score`` where words were given; ``fluent`` and ``perplexity`` of :class:`SteeredCompletions`.
    completions : SteeredCompletions
        Of all k vectors at one strength.
    random_divergence : float
        The largest ``divergence`` of k random vectors of the same length.
    """

    columns: dict[str, list[Any]]
    completions: SteeredCompletions
    random_divergence: float

    @property
    def table(self) -> pd.DataFrame:
        """The columns as a DataFrame, one row a vector."""
        return pd.DataFrame(self.columns)


def measure_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cmap: CausalMap,
    dct: Transcoder,
    instructions: Sequence[Instruction],
    *,
    words: tuple[str, str] | None = None,
    strength: float = 1.0,
    max_new_tokens: int = 24,
    seed: int = 0,
    progress: bool = True,
    **chat: Any,
) -> Measurements:
    """Measure every steering vector of a transcoder on held-out instructions, with no target word needed.

    Parameters
    ----------
    cmap : CausalMap
        The map that `dct` was fitted to.
    instructions : sequence of str or of conversations
        In no chat format, and not fitted.
    words : (str, str), optional
        A positive and a negative one-token word: adds the column ``score``.
    strength : float
        Multiple of ``dct.steering_vectors()`` that is measured.
    seed : int
        Seed of the random vectors to compare with.
    **chat
        Options of :func:`dctlib.format_chat`, such as ``system``.
    """
    layer = _source(dct)
    vectors = dct.steering_vectors()
    scaled = strength * vectors
    texts = format_chat(tokenizer, instructions, **chat)
    caused = effects(model, tokenizer, texts, scaled, layer=layer, progress=progress)
    columns = {
        "vector": [*range(len(vectors))],
        "alpha": dct.alpha.repeat(len(vectors) // len(dct)).tolist(),
        "change": cmap(scaled).norm(dim=1).tolist(),
        "divergence": caused.divergence.mean(1).tolist(),
        "next": tokenizer.batch_decode(caused.token.mode(1).values[:, None]),
    }
    if words:
        positive, negative = words
        scores = score_vectors(
            model, tokenizer, texts, scaled, layer=layer, positive=positive, negative=negative, progress=progress
        )
        columns["score"] = scores.tolist()
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": progress}
    clean = generate_completions(model, tokenizer, texts, **options)
    completions = complete_at_strengths(
        model, tokenizer, instructions, clean, vectors, layer=layer, strengths=[strength], **options, **chat
    )
    columns |= {"fluent": completions.fluent, "perplexity": completions.perplexity}
    baseline = random_vectors(len(vectors), cmap.d_source, norm=strength * dct.input_scale, seed=seed)
    random_effects = effects(model, tokenizer, texts, baseline, layer=layer, progress=progress)
    return Measurements(columns, completions, random_effects.divergence.mean(1).max().item())


def rank_and_cluster(
    table: pd.DataFrame, vectors: Float[Tensor, "k d"], *, by: str, cosine: float = 0.5
) -> pd.DataFrame:
    """Sort the rows of `table` by a column, highest first, and number the clusters of parallel vectors.

    Equal rows are sorted by their ``divergence``, where it was measured. The column ``alike`` is the cluster's number,
    see :func:`dctlib.fits.compare.cosine_clusters`.
    """
    if by not in table:
        raise ValueError(f"got rank_by={by!r}, expected one of {', '.join(table.select_dtypes('number'))}")
    keys = [by] if by == "divergence" or "divergence" not in table else [by, "divergence"]
    ranked = table.sort_values(keys, ascending=False)
    return ranked.assign(alike=cosine_clusters(vectors[ranked["vector"].tolist()], cosine=cosine))


@dataclass(frozen=True, eq=False)
class Discovery:
    """Ranked vectors of a transcoder, and completions under the first of each cluster.

    Attributes
    ----------
    dct : Transcoder
        With a factor for each vector: both signs of a linear or quadratic fit.
    ranked : DataFrame
        All vectors, the most interesting first: the columns of :class:`Measurements`, and ``alike``.
    random_divergence : float
        See :class:`Measurements`.
    shown : list of int
        The first vectors of clusters, one each.
    completions : SteeredCompletions
        Completions under those, at every strength.
    change_norms : Tensor, (k, blocks + 1)
        Of all vectors in the order of `ranked`, see :func:`dctlib.steering.effects.change_norm_by_layer`.
    """

    dct: Transcoder
    ranked: pd.DataFrame
    random_divergence: float
    shown: list[int]
    completions: SteeredCompletions
    change_norms: Float[Tensor, "k depths"]

    def excerpts(self, *, characters: int) -> pd.DataFrame:
        """Return the rows of `ranked` that are shown, each with its first completion, truncated."""
        completions = next(iter(self.completions.steered.values()))
        rows = self.ranked.set_index("vector").loc[self.shown]
        return rows.assign(says=[truncate(each[0], characters) for each in completions]).reset_index()

    def summary(self, *, characters: int) -> dict[str, Any]:
        """Return slice, scale, counts and excerpts as JSON-able results."""
        divergence = self.ranked["divergence"].tolist()
        fluent = self.ranked["fluent"].tolist()
        return {
            "source": self.dct.source,
            "target": self.dct.target,
            "input_scale": self.dct.input_scale,
            "of": len(self.ranked),
            "floor": self.random_divergence,
            "above_floor": sum(each > self.random_divergence for each in divergence),
            "clusters": len(set(self.ranked["alike"])),
            "fluent": sum(each >= 0.5 for each in fluent),
            "readings": self.excerpts(characters=characters).to_dict("records"),
        }


def rank_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dct: Transcoder,
    instructions: Sequence[Instruction],
    measured: Measurements,
    *,
    rank_by: str = "fluent",
    shown: int = 12,
    strengths: Sequence[float] = (1.0,),
    max_new_tokens: int = 24,
    progress: bool = True,
    **chat: Any,
) -> Discovery:
    """Rank measured vectors, and complete the instructions under the first of each cluster at every strength.

    The default ranking is by ``fluent``, because the vectors that change the next token most break the model.

    Parameters
    ----------
    instructions, measured
        The argument and the result of :func:`measure_vectors`, whose `strength` was the first of `strengths`.
    rank_by : str
        A numeric column of ``measured.table``.
    shown : int
        Clusters of which the first vector is shown.
    **chat
        As for :func:`measure_vectors`.
    """
    layer = _source(dct)
    vectors = dct.steering_vectors()
    ranked = rank_and_cluster(measured.table, vectors, by=rank_by)
    first = ranked.drop_duplicates("alike").head(shown)["vector"].tolist()
    completions = measured.completions.select(first)
    texts = format_chat(tokenizer, instructions, **chat)
    options: dict[str, Any] = {"layer": layer, "max_new_tokens": max_new_tokens, "progress": progress}
    others = {
        strength: generate_per_vector(model, tokenizer, texts, strength * vectors[first], **options)
        for strength in strengths[1:]
    }
    completions = replace(completions, steered=completions.steered | others)
    scaled = strengths[0] * vectors[ranked["vector"].tolist()]
    norms = change_norm_by_layer(model, tokenizer, texts, scaled, layer=layer)
    signed = dct if len(dct) == len(vectors) else dct.with_negations()
    return Discovery(signed, ranked, measured.random_divergence, first, completions, norms)


def _source(dct: Transcoder) -> int:
    if dct.source is None:
        raise ValueError("this transcoder was fitted to a plain function, expected one fitted to layers of a model")
    return dct.source
