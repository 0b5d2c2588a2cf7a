"""Methods side by side: the same candidates' length, the same ranking, the same judge."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.answers import Example, answer_loss
from dctlib.baselines import difference_of_means
from dctlib.entrants import Entrant, entrants
from dctlib.generate import complete, complete_each
from dctlib.intervene import ablate, steer
from dctlib.lessons import REFUSAL, Lesson, epochs
from dctlib.organisms import Training, make_organism
from dctlib.orthogonalise import normalise
from dctlib.prompts import format_chat, tokenize_each
from dctlib.rank import score_each
from dctlib.sampling import sample

Judge = Callable[[Sequence[str], Sequence[str]], list[bool]]
Run = tuple[PreTrainedModel, PreTrainedTokenizerBase]


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
    melbo_learning_rate: float,
    seed: int,
    source: int,
    target: int,
    folder: Path,
) -> dict[str, Entrant]:
    """What methods that know nothing but the map find: `num_factors` vectors of length R each, fewer by MELBO.

    MELBO finds one vector after another, so its vectors cost most; power steering leaves the sign open and gives both.
    """
    melbo = {"num_vectors": melbo_vectors, "steps": melbo_steps, "learning_rate": melbo_learning_rate}
    methods = {
        "DCT": {"method": "exponential", "num_factors": num_factors, "iterations": iterations},
        "MELBO": {"method": "MELBO", **melbo},
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


@dataclass(frozen=True, eq=False)
class Tried:
    """What k tries made a model say to n requests, and whether each answers its request.

    Attributes
    ----------
    said : list of list of str
        n completions a try.
    solved : Tensor, (k, n)
        The judge's verdicts.
    """

    said: list[list[str]]
    solved: Bool[Tensor, "k n"]


def judged(judge: Judge, requests: Sequence[str], said: list[list[str]]) -> Tried:
    """Tries at the requests, with the judge's verdict of each completion."""
    return Tried(said, torch.tensor([judge(requests, completions) for completions in said]))


def steered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    vectors: Float[Tensor, "k d"],
    judge: Judge,
    *,
    layer: int,
    max_new_tokens: int,
    progress: bool = True,
) -> Tried:
    """What the model says under each vector, one try a vector."""
    texts, options = format_chat(tokenizer, requests), {"max_new_tokens": max_new_tokens, "progress": progress}
    return judged(judge, requests, complete_each(model, tokenizer, texts, vectors, layer=layer, **options))


def spoken(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    judge: Judge,
    *,
    max_new_tokens: int,
    progress: bool = True,
) -> Tried:
    """What the model says as it is, or as a context such as :func:`dctlib.ablate` makes it: one try."""
    texts, options = format_chat(tokenizer, requests), {"max_new_tokens": max_new_tokens, "progress": progress}
    return judged(judge, requests, [complete(model, tokenizer, texts, **options)])


def drawn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    judge: Judge,
    *,
    count: int,
    max_new_tokens: int,
    seed: int,
    progress: bool = True,
) -> Tried:
    """`count` samples of the unsteered model at temperature 1, one try a sample."""
    texts, options = format_chat(tokenizer, requests), {"max_new_tokens": max_new_tokens, "progress": progress}
    return judged(judge, requests, sample(model, tokenizer, texts, count=count, seed=seed, **options))


def next_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Float[Tensor, "n vocabulary"]:
    """log p of the token after each text, in float32."""
    with torch.no_grad():
        rows = [model(row.to(model.device)).logits[0, -1] for row in tokenize_each(tokenizer, texts)]
    return torch.stack(rows).float().log_softmax(-1).cpu()


def damage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benign: Sequence[str],
    usual: Float[Tensor, "n vocabulary"],
    judge: Judge,
    *,
    max_new_tokens: int,
    progress: bool = True,
) -> dict[str, float]:
    """What a change does to benign requests: KL(changed ‖ usual) of the next token in nats, and the share answered.

    Parameters
    ----------
    usual : Tensor, (n, vocabulary)
        :func:`next_token` of the same requests, in the chat format, without the change.
    """
    after = next_token(model, tokenizer, format_chat(tokenizer, benign))
    answered = spoken(model, tokenizer, benign, judge, max_new_tokens=max_new_tokens, progress=progress).solved
    kl = F.kl_div(usual, after, log_target=True, reduction="batchmean")
    return {"benign_kl": kl.item(), "benign_answered": answered.double().mean().item()}


def changes(
    run: Run,
    firsts: Mapping[str, Float[Tensor, " d"]],
    added: Mapping[str, Float[Tensor, " d"]],
    lora: Run,
    *,
    layer: int,
) -> dict[str, tuple[Run, AbstractContextManager[None]]]:
    """Every change of a model that is compared, as the model to ask and the context to ask it in, to be entered once.

    Parameters
    ----------
    firsts, added : mapping
        Method → the vector that it steers with: of what searches, its first; and :func:`told`.
    """
    vectors = {**firsts, **added}
    changed: dict[str, Any] = {name: (run, steer(run[0], layer=layer, vector=v)) for name, v in vectors.items()}
    changed["means, ablated"] = run, ablate(run[0], added["means, added"])
    changed["LoRA"] = lora, nullcontext()
    return changed


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
