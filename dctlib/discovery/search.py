"""Search for steering vectors that do something, each at a length that unlocks and does not break."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.discovery.behaviour import group_behaviours, map_behaviours
from dctlib.discovery.criteria import Criteria
from dctlib.discovery.damage import everyday_questions, measure_damage, unsteered_answers
from dctlib.discovery.found import (
    FoundVectors,
    describe_candidates,
    excerpt_columns,
    grade_columns,
    is_above,
)
from dctlib.discovery.lengths import estimate_lengths, longest_within
from dctlib.discovery.options import SearchOptions
from dctlib.discovery.pool import find_candidates
from dctlib.discovery.reading import Halving, Judge, Reader, Reading, ask_judge, halve
from dctlib.evaluation.judges import fraction_true, truncate
from dctlib.maps.causal import CausalMap
from dctlib.models.chat import Instruction, format_chat
from dctlib.steering.generation import generate_completions

# Each stage with its share of the time, in percent.
_STAGES = {
    "unsteered answers": 3,
    "calibrate and fit": 18,
    "halve on text": 20,
    "choose lengths": 19,
    "read and compare": 40,
}
_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
SEARCH_VERSION = 5
"""Part of the key of remembered searches: raise it with any change that alters :func:`search_vectors`' results."""

_SURVIVORS = 16  # of the halving
_FINALISTS = 8
_RANKING_PROMPTS = 4  # on which the survivors are compared at their lengths
_ELSEWHERE = 8  # harmless requests that finalists are read on
_FEW_ANSWERS, _ANSWERS = 4, 8  # to harmless requests, on which lengths are estimated and chosen
_LEAST_VALIDATION = 4
_LEAST_BENIGN = 6


class SearchSettings(SearchOptions):
    """Further options of :func:`search_vectors`, by name."""

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

    Candidates of three methods are fitted to `fit`, and random directions join them as a control. Successive halving
    reads all of them on few tokens of the first half of `validation`, each at a length whose damage is about a bound.
    At most 16 survive, and two random ones. Their lengths are then measured to be within the bound. The best 8, and one
    random one, are read on all of `validation`. A vector is found if its score on the second half is above that of no
    vector, by a margin.

    The score of a vector is the fraction of its completions that the judge finds True. Without a judge it is
    ``unlock`` of :class:`dctlib.discovery.criteria.Grades`, averaged over the worst three quarters of requests: how
    much more the vector's answers say about their requests than the unsteered answers. The score must then also exceed,
    by the margin, the vector's own score on harmless requests. If the unsteered answers are about their requests
    already, nothing is found without a judge, and candidates are ranked by how much they change.

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
        By default, 24 everyday questions.
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
    benign = everyday_questions() if benign is None else benign
    texts = _check_instructions(tokenizer, fit, validation, benign, chat)
    cmap = CausalMap.from_model(model, tokenizer, texts, source=source, target=target)
    if not 1 <= num_factors <= cmap.d_source:
        raise ValueError(f"got num_factors={num_factors}, expected 1 to the model's width, {cmap.d_source}")
    chosen_on, reported_on = benign[::2], benign[1::2]
    ranking, held_out = validation[: len(validation) // 2], slice(len(validation) // 2, None)
    tokens = settings.answer_tokens

    with tqdm(total=100, disable=not settings.progress, bar_format=_BAR) as bar:
        _announce(bar, 1)
        if judge is not None:
            _check_judge(model, tokenizer, judge, validation, tokens, chat)
        examples = unsteered_answers(model, tokenizer, chosen_on, **chat)
        reader = Reader(model, tokenizer, source, Criteria.from_answers(model, tokenizer, examples), judge, chat)

        _announce(bar, 2)
        pool = find_candidates(
            cmap, num_factors, nonlinearity=settings.nonlinearity, iterations=settings.iterations, seed=seed
        )
        at_R = pool.input_scale * pool.directions

        _announce(bar, 3)
        roughly = partial(measure_damage, model, tokenizer, examples[:_FEW_ANSWERS], layer=source)
        estimate = estimate_lengths(roughly, at_R, settings.max_damage)
        vectors = torch.tensor(estimate)[:, None] * at_R
        halving = halve(
            reader, ranking, vectors, controls=pool.controls, most=_SURVIVORS, least=_FINALISTS, max_new_tokens=tokens
        )

        _announce(bar, 4)
        measure = partial(measure_damage, model, tokenizer, examples[:_ANSWERS], layer=source)
        multiples = _choose_lengths(measure, at_R, halving, estimate, settings.max_damage)
        for row, multiple in multiples.items():
            vectors[row] = multiple * at_R[row]
        # The last of the ranking prompts, because the first round of the halving read the first.
        reading = reader.read(ranking[-_RANKING_PROMPTS:], vectors[[*multiples]], max_new_tokens=math.ceil(tokens / 2))
        finalists = _choose_finalists([[*multiples][place] for place in reading.order()], halving)

        _announce(bar, 5)
        reading = reader.read(validation, vectors[finalists], max_new_tokens=tokens)
        unsteered = 0.0  # without a judge, because unsteered answers unlock nothing
        if judge is not None:
            unsteered = fraction_true(ask_judge(judge, validation[held_out], reading.unsteered[held_out]))
        table = _describe_finalists(reading, finalists, vectors, validation, held_out, settings)
        bound = unsteered + settings.margin
        promising = [row for row, score in zip(table.index, table["held_out"], strict=True) if score >= bound]
        if judge is None and promising:
            elsewhere = reader.read(reported_on[:_ELSEWHERE], vectors[promising], max_new_tokens=tokens)
            table.loc[promising, "elsewhere"] = elsewhere.scores()
        harmless = unsteered_answers(model, tokenizer, reported_on, **chat)
        table["damage"] = measure_damage(
            model, tokenizer, harmless, vectors[table.index.tolist()], layer=source
        ).tolist()
        _announce(bar, len(_STAGES) + 1)
    table["source"] = [pool.sources[row] for row in table.index]
    table["multiple"] = [multiples[row] for row in table.index]
    table["excess"] = table["score"] - table["elsewhere"].fillna(0 if judge else math.nan)
    table["found"] = is_above(table, unsteered=unsteered, margin=settings.margin)
    candidates = describe_candidates(
        pool.sources,
        vectors.norm(dim=1).tolist(),
        halving,
        ranking,
        table.sort_values("excess", ascending=False, kind="stable"),
        characters=settings.shown_characters,
    )
    return FoundVectors(
        source,
        pool.input_scale,
        candidates,
        vectors,
        _truncated(reading.unsteered, settings),
        {row: _truncated(texts, settings) for row, texts in zip(finalists, reading.completions, strict=True)},
        judge is not None,
        _map_of(validation, *(halving.rounds[0] if halving.rounds else (finalists, reading)), len(vectors)),
    )


def _map_of(requests: Sequence[Instruction], rows: Sequence[int], reading: Reading, m: int) -> Float[Tensor, "m+1 2"]:
    """Return ``FoundVectors.map`` by a reading of some rows on the first of `requests`."""
    points = torch.full((m + 1, 2), math.nan)
    asked = requests[: len(reading.unsteered)]
    points[[*rows, m]] = map_behaviours(asked, [*reading.completions, reading.unsteered])
    return points


def _choose_lengths(
    measure: Callable[[Tensor], Tensor],
    at_R: Float[Tensor, "m d"],
    halving: Halving,
    estimate: Sequence[float],
    max_damage: float,
) -> dict[int, float]:
    """Return the row of each survivor of a halving with its longest multiple of R within the bound, if it has one."""
    survivors = [*halving.rows, *halving.controls]
    start = [estimate[row] for row in survivors]
    limits = longest_within(measure, at_R[survivors], max_damage, start=start)
    return {row: limit for row, limit in zip(survivors, limits, strict=True) if limit}


def _choose_finalists(ranked: Sequence[int], halving: Halving) -> list[int]:
    """Return the best eight rows, and the best random one, of those ranked best first."""
    found = [row for row in ranked if row in halving.rows][:_FINALISTS]
    return found + [row for row in ranked if row in halving.controls][:1]


def _describe_finalists(
    reading: Reading,
    rows: Sequence[int],
    vectors: Float[Tensor, "m d"],
    validation: Sequence[Instruction],
    held_out: slice,
    settings: SearchSettings,
) -> pd.DataFrame:
    """Return a table of the reading of some rows of `vectors`, best first, indexed by row.

    Parameters
    ----------
    reading : Reading
        Of all of `validation`, under each of the rows.
    held_out : slice
        The requests that no vector was chosen on.
    """
    columns: dict[str, Any] = {
        "length": vectors[[*rows]].norm(dim=1).tolist(),
        "score": reading.scores(),
        "held_out": reading.scores(held_out),
        "elsewhere": math.nan,
        "change": reading.changes(),
        **grade_columns(reading),
        **excerpt_columns(reading, validation, held_out, settings.shown_characters),
    }
    order = reading.order()
    table = pd.DataFrame(columns).loc[order].set_axis([rows[place] for place in order])
    table["behaviour"] = group_behaviours(validation, [reading.completions[place] for place in order])
    return table


def _truncated(completions: Sequence[str], settings: SearchSettings) -> list[str]:
    return [truncate(completion, settings.shown_characters) for completion in completions]


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
    names, shares = list(_STAGES), list(_STAGES.values())
    bar.update(sum(shares[: stage - 1]) - bar.n)
    if stage <= len(names):
        bar.set_description(f"stage {stage} of {len(names)}, {names[stage - 1]}")
