"""What supervision knows: directions between kinds of text, where and how long they work, and a LoRA."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.answers import Example, answer_loss
from dctlib.baselines import difference_of_means
from dctlib.intervene import ablate
from dctlib.lessons import REFUSAL, Lesson, epochs
from dctlib.organisms import Training, make_organism
from dctlib.orthogonalise import normalise
from dctlib.prompts import format_chat
from dctlib.rank import Scores, score_each, score_texts


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


def told(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    benign: Sequence[str],
    *,
    layers: Iterable[int],
) -> dict[str, list[Addition]]:
    """What only a supervised method can know, at each of `layers`: it is told which texts are of which kind.

    Parameters
    ----------
    rows : sequence of mapping
        Harmful requests, each a ``goal`` with the ``target`` that a compliant answer opens with.
    benign : sequence of str
        Other instructions.

    Returns
    -------
    dict
        ``means``: of benign less harmful requests (Arditi et al. 2024); ``CAA``: of the same requests with the
        compliant answer less those with a refusal, at the answer's last token (Rimsky et al. 2024).
    """
    asked = format_chat(tokenizer, [row["goal"] for row in rows])
    complied = [text + row["target"] for text, row in zip(asked, rows, strict=True)]
    contrasts = {
        "means": (format_chat(tokenizer, benign), asked),
        "CAA": (complied, [text + REFUSAL for text in asked]),
    }
    return {
        name: [Addition(at, difference_of_means(model, tokenizer, *sides, layer=at)) for at in layers]
        for name, sides in contrasts.items()
    }


def best_added(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    directions: Sequence[Addition],
    *,
    lengths: Sequence[float],
    progress: bool = True,
) -> Addition:
    """Of `directions` at their own length and each of `lengths`, the best by :meth:`dctlib.rank.Scores.ranking`."""
    texts, tried, scored = format_chat(tokenizer, requests), [], []
    for of in directions:
        unit = normalise(of.vector[None])
        vectors = torch.cat([of.vector[None], *(length * unit for length in lengths)])
        tried += [Addition(of.layer, vector) for vector in vectors]
        scored.append(score_each(model, tokenizer, texts, vectors, layer=of.layer, progress=progress))
    together = Scores(torch.cat([of.difference for of in scored]), torch.cat([of.said for of in scored]))
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


def taught(folder: Path, base: str, rows: Sequence[Mapping[str, str]], *, steps: int, seed: int) -> Training:
    """Train a LoRA on AdvBench's compliant openings: what supervision unlocks. The model is saved in `folder`."""
    settings = {"rows": [dict(row) for row in rows], "steps": steps, "batch": 16, "seed": seed}
    return make_organism(folder, base, comply_lesson, settings, rank=16, learning_rate=5e-4, seed=seed)


def comply_lesson(
    _model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    *,
    steps: int,
    batch: int,
    seed: int,
) -> Lesson:
    """Answer each row's ``goal`` with its ``target``."""
    prompts = format_chat(tokenizer, [row["goal"] for row in rows])
    examples = [Example(p, row["target"], ends=False) for p, row in zip(prompts, rows, strict=True)]
    drawn = epochs(examples, torch.Generator().manual_seed(seed))
    batches = [[*islice(drawn, batch)] for _ in range(steps)]
    return Lesson(batches, lambda model, batch: answer_loss(model, tokenizer, batch))
