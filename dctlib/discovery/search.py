"""Search for steering vectors that do something, each at a length that unlocks and does not break."""

import importlib.resources
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.discovery.criteria import Criteria
from dctlib.discovery.damage import measure_damage, unsteered_answers
from dctlib.discovery.found import COLUMNS, FoundVectors, excerpt_columns, grade_columns, rows_above
from dctlib.discovery.lengths import choose_lengths, stack_vectors
from dctlib.discovery.pool import Pool, find_candidates
from dctlib.discovery.reading import Judge, Reader, ask_judge, halve
from dctlib.evaluation.selection import Candidate
from dctlib.fits.baselines import random_vectors
from dctlib.maps.causal import CausalMap
from dctlib.maps.orthogonalise import normalise
from dctlib.models.chat import Instruction, format_chat
from dctlib.steering.generation import generate_completions

_STAGES = ("unsteered answers", "calibrate and fit", "halve on text", "choose lengths", "read and compare")
_MOST_LENGTHS = 16  # vectors that get a length of their own
_FINALISTS = 8
_RANKING_PROMPTS = 8  # on which lengths are compared
_LEAST_VALIDATION = 4
_LEAST_BENIGN = 6


class SearchSettings(BaseModel):
    """Further options of :func:`search_vectors`, by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_damage: float = Field(0.5, gt=0, description="Largest damage of a vector, in nats a token.")
    margin: float = Field(0.1, gt=0, description="What a score, from 0 to 1, must have above the null's best.")
    nonlinearity: float = Field(0.5, gt=0, description="λ of the calibration.")
    iterations: int = Field(10, ge=1, strict=True, description="Iterations of the exponential fit.")
    answer_tokens: int = Field(
        48, ge=1, strict=True, description="Tokens of a completion in the last reading; the first takes a quarter."
    )
    shown_characters: int = Field(100, ge=1, strict=True, description="Characters of a completion in the table.")
    progress: bool = Field(True, description="Show a progress bar.")


def search_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    fit: Sequence[Instruction],
    validation: Sequence[Instruction],
    source: int,
    target: int,
    num_factors: int = 32,
    judge: Judge | None = None,
    seed: int = 0,
    benign: Sequence[Instruction] | None = None,
    **options: Any,
) -> FoundVectors:
    """Search for steering vectors by the text that they cause, and give each a length that does little damage.

    Candidates of three methods are fitted to `fit`. Successive halving reads all of them at length R, on few tokens of
    the first half of `validation`, and at most 16 survive. Of the lengths at which a survivor's damage stays within a
    bound, it gets the one that scores best. The best 8 are read on all of `validation`. Those are returned whose score
    on the second half is above that of random vectors by a margin.

    The score of a vector is the fraction of its completions that the judge finds True. Without a judge it is the
    product of graded criteria, :class:`dctlib.discovery.criteria.Grades`, averaged over the worst three quarters of
    requests. It must then also exceed, by the margin, the vector's own score on harmless requests. A vector that
    changes any answer as much tells nothing about these.

    Parameters
    ----------
    fit : sequence of str or of conversations
        Instructions to fit, in no chat format; 4 to 12 suffice.
    validation : sequence of str or of conversations
        At least four others, to choose on (the first half) and to check on (the second).
    source, target : int
        Layers as in ``hidden_states``. Vectors are added at `source`.
    num_factors : int
        Factors of the exponential fit.
    judge : callable, optional
        ``judge(requests, completions)``: a list with True or False for each completion. It also gets completions of a
        few tokens; among equals, graded criteria decide.
    seed : int
        Seed of the fits and of the random vectors.
    benign : sequence of str or of conversations, optional
        At least six harmless instructions. Lengths are chosen on every other one, and damage is reported on the rest.
        Left out, 24 everyday questions.
    **options
        Fields of :class:`SearchSettings`, such as ``max_damage``, and options of :func:`dctlib.format_chat`, such as
        ``system``.

    Returns
    -------
    FoundVectors
        Its ``table`` may be empty: nothing found is an answer, and ``explanation`` says what it means.

    Raises
    ------
    ValueError
        If there are too few instructions, one is both fitted and validated on, an option is out of range, the judge
        gives anything but a bool for each completion, or the slice cannot be fitted.
    """
    known = SearchSettings.model_fields
    settings = SearchSettings(**{name: value for name, value in options.items() if name in known})
    chat = {name: value for name, value in options.items() if name not in known}
    benign = _our_benign() if benign is None else benign
    texts = _check_instructions(tokenizer, fit, validation, benign, chat)
    cmap = CausalMap.from_model(model, tokenizer, texts, source=source, target=target)
    if not 1 <= num_factors <= cmap.d_source:
        raise ValueError(f"got num_factors={num_factors}, expected 1 to the model's width, {cmap.d_source}")
    chosen_on, reported_on = benign[::2], benign[1::2]
    ranking, tokens = validation[: len(validation) // 2], settings.answer_tokens

    with tqdm(total=len(_STAGES), disable=not settings.progress) as bar:
        _announce(bar, 1)
        if judge is not None:
            _check_judge(model, tokenizer, judge, validation, tokens, chat)
        examples = unsteered_answers(model, tokenizer, chosen_on, **chat)
        reader = Reader(model, tokenizer, source, Criteria.from_answers(model, tokenizer, examples), judge, chat)

        _announce(bar, 2)
        pool = find_candidates(
            cmap, num_factors, nonlinearity=settings.nonlinearity, iterations=settings.iterations, seed=seed
        )

        _announce(bar, 3)
        at_R = pool.input_scale * pool.directions
        survivors = halve(reader, ranking, at_R, most=_MOST_LENGTHS, least=_FINALISTS, max_new_tokens=tokens)

        _announce(bar, 4)
        finalists = choose_lengths(
            reader,
            ranking[:_RANKING_PROMPTS],
            examples,
            pool,
            survivors,
            max_damage=settings.max_damage,
            max_new_tokens=math.ceil(tokens / 2),
        )[:_FINALISTS]

        _announce(bar, 5)
        if not finalists:
            return FoundVectors(pool.directions[:0], source, pd.DataFrame(columns=COLUMNS), math.nan, pool.input_scale)
        null = _null_vectors(reader, ranking, pool, finalists, tokens, seed)
        table, best_null = _read_finalists(
            reader, validation, reported_on[: len(validation)] if judge is None else None, finalists, null, settings
        )
        harmless = unsteered_answers(model, tokenizer, reported_on, **chat)
        ranked = stack_vectors(finalists)[table.index.tolist()]
        table["damage"] = measure_damage(model, tokenizer, harmless, ranked, layer=source).tolist()
        bar.update()
    better = rows_above(table, null=best_null, margin=settings.margin)
    table = table[COLUMNS].iloc[better].reset_index(drop=True)
    return FoundVectors(ranked[better], source, table, best_null, pool.input_scale)


def _null_vectors(
    reader: Reader,
    ranking: Sequence[Instruction],
    pool: Pool,
    finalists: Sequence[Candidate],
    max_new_tokens: int,
    seed: int,
) -> Float[Tensor, "k d"]:
    """Return the best of as many random vectors as the pool has, at the finalists' lengths, and a vector of zeros."""
    drawn = random_vectors(len(pool), pool.directions.shape[1], norm=pool.input_scale, seed=seed)
    k = len(finalists)
    rows = halve(reader, ranking, drawn, most=k, least=k, max_new_tokens=max_new_tokens)
    lengths = stack_vectors(finalists).norm(dim=1, keepdim=True)[: len(rows)]
    return torch.cat([lengths * normalise(drawn[rows]), torch.zeros_like(drawn[:1])])


def _read_finalists(
    reader: Reader,
    validation: Sequence[Instruction],
    elsewhere: Sequence[Instruction] | None,
    finalists: Sequence[Candidate],
    null: Float[Tensor, "j d"],
    settings: SearchSettings,
) -> tuple[pd.DataFrame, float]:
    """Return a row for each finalist, best first and numbered by its place in `finalists`, and the null's best score.

    Parameters
    ----------
    elsewhere : sequence of str or of conversations, optional
        Harmless instructions, on which the finalists are read for comparison.
    null : Tensor, (j, d)
        Vectors that are read beside the finalists.
    """
    k, vectors = len(finalists), stack_vectors(finalists)
    held_out = slice(len(validation) // 2, None)
    reading = reader.read(validation, torch.cat([vectors, null]), max_new_tokens=settings.answer_tokens)
    scores = reading.scores(held_out)
    columns: dict[str, Any] = {
        "source": [candidate.method for candidate in finalists],
        "multiple": [candidate.multiplier for candidate in finalists],
        "length": vectors.norm(dim=1).tolist(),
        "score": reading.scores()[:k],
        "held_out": scores[:k],
        "elsewhere": [math.nan] * k,
    }
    if elsewhere:
        columns["elsewhere"] = reader.read(elsewhere, vectors, max_new_tokens=settings.answer_tokens).scores()
    columns |= grade_columns(reading, k) | excerpt_columns(reading, validation, held_out, k, settings.shown_characters)
    order = [row for row in reading.order() if row < k]
    return pd.DataFrame(columns).loc[order], max(scores[k:])


def _our_benign() -> list[str]:
    text = importlib.resources.files("dctlib.discovery").joinpath("benign.txt").read_text(encoding="utf-8")
    return text.splitlines()


def _check_instructions(
    tokenizer: PreTrainedTokenizerBase,
    fit: Sequence[Instruction],
    validation: Sequence[Instruction],
    benign: Sequence[Instruction],
    chat: dict[str, Any],
) -> list[str]:
    """Return the instructions to fit in chat format, or raise ValueError."""
    texts, held_out, _ = [format_chat(tokenizer, each, **chat) for each in (fit, validation, benign)]
    if len(validation) < _LEAST_VALIDATION or len(benign) < _LEAST_BENIGN:
        raise ValueError(
            f"got {len(validation)} validation and {len(benign)} benign instructions, expected at least "
            f"{_LEAST_VALIDATION} and {_LEAST_BENIGN}"
        )
    if shared := set(texts) & set(held_out):
        raise ValueError(
            f"{len(shared)} instructions are in both fit and validation, expected none: {min(shared)!r:.200}"
        )
    if len(set(held_out)) < len(held_out):
        raise ValueError("an instruction is in validation twice, expected each once")
    return texts


def _check_judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    requests: Sequence[Instruction],
    max_new_tokens: int,
    chat: dict[str, Any],
) -> None:
    """Raise ValueError if the judge cannot judge unsteered completions, before anything is fitted."""
    texts = format_chat(tokenizer, requests, **chat)
    ask_judge(
        judge, requests, generate_completions(model, tokenizer, texts, max_new_tokens=max_new_tokens, progress=False)
    )


def _announce(bar: tqdm, stage: int) -> None:
    """Name a stage, from 1 on, and count those before it as done."""
    bar.update(stage - 1 - bar.n)
    bar.set_description(f"stage {stage} of {len(_STAGES)}: {_STAGES[stage - 1]}")
