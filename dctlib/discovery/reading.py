"""Completions under steering vectors and their scores, and successive halving by them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.discovery.criteria import Criteria, Grades
from dctlib.models.chat import Instruction, format_chat
from dctlib.steering.generation import generate_per_vector

Judge = Callable[[Sequence[Instruction], Sequence[str]], Sequence[bool]]
"""``judge(requests, completions)``: a verdict on each completion of the request at its place."""

_PROMPTS = 4  # of the first round of a halving
_CONTROLS = 2  # that each round of a halving keeps
_CONSISTENT = 0.75  # fraction of prompts that count, the worst ones, so that no single prompt decides


@dataclass(frozen=True, eq=False)
class Reading:
    """Completions of n requests under k vectors, judged and graded.

    Attributes
    ----------
    completions : list of list of str
        For each vector its n completions.
    unsteered : list of str
        The n completions without a vector.
    grades : Grades
        Of each, by the criteria.
    verdicts : Tensor, (k, n), or None
        1 where the judge said True, 0 elsewhere; None without a judge.
    """

    completions: list[list[str]]
    unsteered: list[str]
    grades: Grades
    verdicts: Float[Tensor, "k n"] | None

    @property
    def each(self) -> Float[Tensor, "k n"]:
        """The score of every completion, from 0 to 1: its verdict or, without a judge, how much it unlocks."""
        return self.grades.unlock if self.verdicts is None else self.verdicts

    def scores(self, prompts: slice = slice(None)) -> list[float]:
        """Return the score of each vector: its fraction of True, or the mean unlock of its worst three quarters."""
        if self.verdicts is not None:
            return self.verdicts[:, prompts].mean(1).tolist()
        return _consistent(self.grades.unlock[:, prompts])

    def changes(self) -> list[float]:
        """Return how much each vector changes: the mean change of its worst three quarters."""
        return _consistent(self.grades.change)

    def order(self) -> list[int]:
        """Return the rows of the vectors, best first: by their score, then by how much they change."""
        keys = list(zip(self.scores(), self.changes(), strict=True))
        return sorted(range(len(keys)), key=lambda row: keys[row], reverse=True)

    def shown(self, prompts: slice) -> list[int]:
        """Return for each vector the index of the one of `prompts` that it scores best on, then changes most."""
        places = range(len(self.unsteered))[prompts]
        pairs = torch.stack([self.each, self.grades.change], -1).tolist()
        return [max(places, key=lambda place: pairs[row][place]) for row in range(len(pairs))]


def _consistent(grades: Float[Tensor, "k n"]) -> list[float]:
    return grades.sort(dim=1).values[:, : math.ceil(_CONSISTENT * grades.shape[1])].mean(1).tolist()


@dataclass(frozen=True, eq=False)
class Reader:
    """What it takes to read completions: the model, the layer to steer, the criteria, and the judge if there is one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layer: int
    criteria: Criteria
    judge: Judge | None
    chat: dict[str, Any] = field(default_factory=dict)

    def read(
        self,
        requests: Sequence[Instruction],
        vectors: Float[Tensor, "k d"],
        *,
        max_new_tokens: int,
    ) -> Reading:
        """Complete requests under each vector, and judge and grade the completions."""
        texts = format_chat(self.tokenizer, requests, **self.chat)
        with_zero = torch.cat([vectors.new_zeros(1, vectors.shape[1]), vectors])
        unsteered, *completions = generate_per_vector(
            self.model,
            self.tokenizer,
            texts,
            with_zero,
            layer=self.layer,
            max_new_tokens=max_new_tokens,
            progress=False,
        )
        grades = self.criteria.grade(texts, unsteered, completions)
        verdicts = None
        if self.judge is not None:
            flat = [completion for each in completions for completion in each]
            found = ask_judge(self.judge, [*requests] * len(completions), flat)
            verdicts = torch.tensor(found, dtype=torch.float).view(len(completions), len(requests))
        return Reading(completions, unsteered, grades, verdicts)


def ask_judge(judge: Judge, requests: Sequence[Instruction], completions: Sequence[str]) -> list[bool]:
    """Return a judge's verdicts.

    Raises
    ------
    ValueError
        If they are not one True or False for each completion.
    """
    verdicts: Any = judge(requests, completions)
    found = verdicts.tolist() if hasattr(verdicts, "tolist") else verdicts  # of an array or a tensor
    if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != len(completions):
        raise ValueError(
            f"the judge returned {found!r:.100} for {len(completions)} completions, expected a list with one True or "
            f"False for each"
        )
    if wrong := [verdict for verdict in found if not isinstance(verdict, bool | np.bool_)]:
        raise ValueError(f"the judge returned the verdict {wrong[0]!r:.100}, expected True or False")
    return [bool(verdict) for verdict in found]


@dataclass(frozen=True, eq=False)
class Halving:
    """The result of a successive halving.

    Attributes
    ----------
    rows, controls : list of int
        The rows of the vectors that are left, best first.
    rounds : list of (list of int, Reading)
        For each round, the rows that were read and their reading.
    """

    rows: list[int]
    controls: list[int]
    rounds: list[tuple[list[int], Reading]]


def halve(
    reader: Reader,
    requests: Sequence[Instruction],
    vectors: Float[Tensor, "m d"],
    *,
    controls: Sequence[int] = (),
    most: int,
    least: int,
    max_new_tokens: int,
) -> Halving:
    """Keep at most `most` vectors, and two controls, by successive halving on the text that they cause.

    The first round reads all vectors on four requests, for a quarter of `max_new_tokens`. Each round keeps the upper
    third, and the next reads it on twice the requests for twice the tokens.

    Parameters
    ----------
    controls : sequence of int
        Rows that compete with each other alone: each round keeps the best two.
    most : int
        Rounds end when at most this many other rows are left.
    least : int
        A round keeps at least this many other rows.
    """
    rows = [row for row in range(len(vectors)) if row not in set(controls)]
    control = [*controls]
    rounds: list[tuple[list[int], Reading]] = []
    prompts, tokens = _PROMPTS, max(1, max_new_tokens // 4)
    while len(rows) > most:
        read = [*rows, *control]
        reading = reader.read(requests[:prompts], vectors[read], max_new_tokens=tokens)
        rounds.append((read, reading))
        kept = max(min(least, most), math.ceil(len(rows) / 3))
        order = [read[place] for place in reading.order()]
        rows = [row for row in order if row in set(rows)][:kept]
        control = [row for row in order if row in set(control)][:_CONTROLS]
        prompts, tokens = 2 * prompts, min(2 * tokens, max_new_tokens)
    return Halving(rows, control, rounds)
