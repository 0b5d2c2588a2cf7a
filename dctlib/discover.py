"""From a fitted slice to vectors worth reading: measured, told apart, and made to speak."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.causal_map import CausalMap
from dctlib.effects import clusters, effects
from dctlib.fit import fit_exponential, fit_linear, fit_quadratic, remembered
from dctlib.generate import complete
from dctlib.judges import fluency
from dctlib.prompts import format_chat
from dctlib.rank import score_vectors
from dctlib.transcoder import Transcoder

Method = Literal["exponential", "quadratic", "linear"]


def fit_by(
    method: Method,
    folder: str | Path,
    cmap: CausalMap,
    *,
    num_factors: int,
    iterations: int,
    input_scale: float,
    seed: int,
) -> Transcoder:
    """A fit of the kind that is named, remembered in `folder`; what a kind has no use for is left out."""
    if method == "linear":
        return remembered(folder, fit_linear, cmap, num_factors=num_factors)
    settings = {"num_factors": num_factors, "iterations": iterations, "seed": seed}
    if method == "quadratic":
        return remembered(folder, fit_quadratic, cmap, **settings)
    return remembered(folder, fit_exponential, cmap, input_scale=input_scale, **settings)


def measure(
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


def distinct(table: pd.DataFrame, vectors: Float[Tensor, "k d"], *, by: str, cosine: float = 0.5) -> pd.DataFrame:
    """Rows of `table`, highest `by` first, with a column ``alike``: vectors that point one way share its number."""
    if by not in table:
        raise ValueError(f"got rank_by={by!r}, expected one of {', '.join(table.select_dtypes('number'))}")
    ranked = table.sort_values(by, ascending=False)
    return ranked.assign(alike=clusters(vectors[ranked["vector"].tolist()], cosine=cosine))


@dataclass(frozen=True)
class Reading:
    """What a model says.

    Attributes
    ----------
    clean : list of str
        Without steering, to each of n instructions.
    steered : dict
        Multiple of the vectors → for each of k vectors its n completions.
    perplexity : list of float
        Median perplexity, under the clean model, of each vector's completions at the first multiple.
    """

    clean: list[str]
    steered: dict[float, list[list[str]]]
    perplexity: list[float]


def read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    vectors: Float[Tensor, "k d"],
    *,
    layer: int,
    strengths: Sequence[float],
    max_new_tokens: int,
    progress: bool = True,
) -> Reading:
    """Complete each instruction under each vector at each strength, and without any."""
    texts, n = format_chat(tokenizer, instructions), len(instructions)
    options = {"max_new_tokens": max_new_tokens, "progress": progress}
    clean, steered = complete(model, tokenizer, texts, **options), {}
    for strength in strengths:
        each = (strength * vectors).repeat_interleave(n, 0)
        said = complete(model, tokenizer, texts * len(vectors), layer=layer, vector=each, **options)
        steered[strength] = [said[first : first + n] for first in range(0, len(said), n)]
    judged = [fluency(model, tokenizer, instructions, said).clamp(max=1e6) for said in steered[strengths[0]]]
    return Reading(clean, steered, [torch.median(found).item() for found in judged])
