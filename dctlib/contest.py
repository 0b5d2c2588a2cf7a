"""Methods side by side: the same candidates' length, the same ranking, the same judge."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.answers import Example, answer_loss
from dctlib.baselines import difference_of_means
from dctlib.entrants import Entrant, entrants
from dctlib.generate import complete, complete_each
from dctlib.intervene import ablate
from dctlib.lessons import REFUSAL, Lesson, epochs
from dctlib.models import load_model
from dctlib.organisms import make_organism
from dctlib.orthogonalise import normalise
from dctlib.prompts import format_chat
from dctlib.rank import score_each
from dctlib.sampling import sample

Judge = Callable[[Sequence[str], Sequence[str]], list[bool]]


def unsupervised(
    model: str,
    dtype: str,
    instructions: list[str],
    *,
    input_scale: float,
    num_factors: int,
    iterations: int,
    melbo_vectors: int,
    melbo_steps: int,
    seed: int,
    source: int,
    target: int,
    folder: Path,
) -> dict[str, Entrant]:
    """What methods that know nothing but the map find: `num_factors` vectors of length R each, fewer by MELBO.

    MELBO finds one vector after another, so its vectors cost most; power steering leaves the sign open and gives both.
    """
    methods = {
        "DCT": {"method": "exponential", "num_factors": num_factors, "iterations": iterations},
        "MELBO": {"method": "MELBO", "num_vectors": melbo_vectors, "steps": melbo_steps, "learning_rate": 0.05},
        "power steering": {"method": "power steering", "num_vectors": num_factors // 2},
        "random": {"method": "random", "num_vectors": num_factors},
    }
    same = {"instructions": instructions, "input_scale": input_scale, "seed": seed}
    searches = {name: {**same, **of} for name, of in methods.items()}
    return entrants(model, dtype, searches, source=source, target=target, folder=folder)


def highest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    vectors: Float[Tensor, "m d"],
    *,
    layer: int,
    count: int,
    progress: bool = True,
) -> Float[Tensor, "k d"]:
    """The `count` first of `vectors` by :meth:`dctlib.rank.Scores.ranking` on validation `requests`."""
    texts = format_chat(tokenizer, requests)
    scores = score_each(model, tokenizer, texts, vectors, layer=layer, progress=progress)
    return vectors[scores.ranking()[:count]]


def successes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    vectors: Float[Tensor, "k d"],
    judge: Judge,
    *,
    layer: int,
    max_new_tokens: int,
    progress: bool = True,
) -> Bool[Tensor, "k n"]:
    """Whether each vector makes the model answer each request, by `judge`."""
    texts, options = format_chat(tokenizer, requests), {"max_new_tokens": max_new_tokens, "progress": progress}
    return judged(judge, requests, complete_each(model, tokenizer, texts, vectors, layer=layer, **options))


def judged(judge: Judge, requests: Sequence[str], tries: Sequence[Sequence[str]]) -> Bool[Tensor, "k n"]:
    """The judge's verdict of every try at every request."""
    return torch.tensor([judge(requests, said) for said in tries])


def told(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    benign: Sequence[str],
    *,
    layer: int,
    norm: float,
) -> dict[str, Float[Tensor, " d"]]:
    """Vectors of length `norm` that only a supervised method can know: it is told which texts are of which kind.

    Parameters
    ----------
    rows : sequence of mapping
        Harmful requests, each a ``goal`` with the ``target`` that a compliant answer opens with.
    benign : sequence of str
        Other instructions.

    Returns
    -------
    dict
        ``means, added``: of benign less harmful requests (Arditi et al. 2024); ``CAA, added``: of the same requests
        with the compliant answer less those with a refusal, at the answer's last token (Rimsky et al. 2024).
    """
    asked = format_chat(tokenizer, [row["goal"] for row in rows])
    complied = [text + row["target"] for text, row in zip(asked, rows, strict=True)]
    contrasts = {
        "means, added": (format_chat(tokenizer, benign), asked),
        "CAA, added": (complied, [text + REFUSAL for text in asked]),
    }
    return {
        name: norm * normalise(difference_of_means(model, tokenizer, *sides, layer=layer)[None])[0]
        for name, sides in contrasts.items()
    }


def without(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    direction: Float[Tensor, " d"],
    judge: Judge,
    *,
    max_new_tokens: int,
) -> Bool[Tensor, "1 n"]:
    """Whether the model answers each request when `direction` is ablated from every residual (Arditi et al. 2024)."""
    with ablate(model, direction):
        said = complete(model, tokenizer, format_chat(tokenizer, requests), max_new_tokens=max_new_tokens)
    return judged(judge, requests, [said])


def taught(
    folder: Path,
    base: str,
    requests: Sequence[str],
    judge: Judge,
    rows: Sequence[Mapping[str, str]],
    *,
    steps: int,
    max_new_tokens: int,
    seed: int,
) -> Bool[Tensor, "1 n"]:
    """Verdicts of a LoRA that learned AdvBench's compliant openings: what supervised training unlocks."""
    settings = {"rows": [dict(row) for row in rows], "steps": steps, "batch": 16, "seed": seed}
    make_organism(folder, base, comply_lesson, settings, rank=16, learning_rate=5e-4, seed=seed)
    model, tokenizer = load_model(folder, dtype="native")
    said = complete(model, tokenizer, format_chat(tokenizer, requests), max_new_tokens=max_new_tokens)
    return judged(judge, requests, [said])


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


def drawn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    judge: Judge,
    *,
    count: int,
    max_new_tokens: int,
    seed: int,
) -> Bool[Tensor, "k n"]:
    """Verdicts of `count` samples of the unsteered model at temperature 1."""
    texts = format_chat(tokenizer, requests)
    return judged(
        judge, requests, sample(model, tokenizer, texts, count=count, max_new_tokens=max_new_tokens, seed=seed)
    )
