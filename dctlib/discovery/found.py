"""What a search returns: vectors at their lengths, and tables of what was read."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from dctlib.discovery.criteria import Grades
from dctlib.discovery.pool import RANDOM
from dctlib.discovery.reading import Halving, Reading
from dctlib.evaluation.judges import truncate
from dctlib.models.chat import Instruction, last_user_turn

_PARTS = [field.name for field in dataclasses.fields(Grades)]
_SCORES = ["score", "held_out", "elsewhere", "excess", "change"]
NUMBERS = ["behaviour", "multiple", "length", "damage", *_SCORES, *_PARTS, "first"]
COLUMNS = ["source", *NUMBERS[:-1], "request", "says"]

_ELSEWHERE = (
    "The model may hide nothing here, or a wider fit, another slice, other requests or a larger max_damage may show it."
)


@dataclass(frozen=True, eq=False)
class FoundVectors:
    """Vectors that do something, best first; there may be none.

    Attributes
    ----------
    layer : int
        Where vectors are added.
    input_scale : float
        R.
    candidates : DataFrame
        All vectors that were read: the found ones, best first, then the others by how far they came. The index is the
        row of `directions`. Columns: ``found``; ``source``, the method; ``behaviour``, a number that vectors share
        under which the model says much the same (:func:`dctlib.discovery.behaviour.group_behaviours`); ``multiple``,
        its ``length`` in units of R; ``damage``, in nats per token; ``score``, on all validation requests;
        ``held_out``, on those that no vector was chosen on; ``elsewhere``, on harmless requests, NaN with a judge;
        ``excess``, ``score`` less ``elsewhere``; ``change``, the score without a judge if the unsteered model withheld
        every answer; the means of the grades by :class:`dctlib.discovery.criteria.Grades`; ``request`` and ``says``,
        one held-out request and its completion, cut short; ``first``, the score in the first round. NaN means that a
        vector did not get that far.
    directions : Tensor, (m, d)
        All candidates, each at the length at which it was read last, float32 on the CPU.
    unsteered : list of str
        Completions of the validation requests without steering, cut short, as all text here.
    completions : dict of int to list of str
        Those under the vectors that were read on all of them, by their row of `directions`.
    judged : bool
        Whether a judge scored the completions.
    map : Tensor, (m + 1, 2)
        Points that are near where vectors make the model say alike, by the first completions that were read. The last
        row is the unsteered model. NaN where a vector was not read.
    """

    layer: int
    input_scale: float
    candidates: pd.DataFrame
    directions: Float[Tensor, "m d"]
    unsteered: list[str]
    completions: dict[int, list[str]]
    judged: bool
    map: Float[Tensor, "m+1 2"]

    @property
    def vectors(self) -> Float[Tensor, "k d"]:
        """The vectors found, each at its own length: ``steer(model, layer=found.layer, vector=found.vectors[0])``."""
        return self.directions[self.rows]

    @property
    def table(self) -> pd.DataFrame:
        """A row for each of :attr:`vectors`: the columns of :attr:`candidates` without the first and the last."""
        return pd.DataFrame(self.candidates.loc[self.rows, COLUMNS]).reset_index(drop=True)

    @property
    def random(self) -> float:
        """The best ``held_out`` of a random direction, searched like the others; NaN if none got that far."""
        scores: Any = self.candidates["held_out"][self.candidates["source"] == RANDOM]
        return float(scores.max())

    def sorted_by(self, column: str) -> "FoundVectors":
        """Return a copy with the vectors found sorted by a column, best first: least damage, or else largest value."""
        found = self.candidates.loc[self.rows].sort_values(by=[column], ascending=column == "damage", kind="stable")
        others = self.candidates.index.drop(found.index)
        return replace(self, candidates=self.candidates.loc[[*found.index, *others]])

    @property
    def rows(self) -> list[int]:
        """The rows of ``directions`` that make up :attr:`vectors`, in order."""
        return self.candidates.index[self.candidates["found"].to_numpy(bool)].tolist()

    def summary(self) -> dict[str, Any]:
        """Return the slice's source, R, counts, and the table's rows as JSON-able results."""
        return {
            "source": self.layer,
            "input_scale": self.input_scale,
            "random": None if math.isnan(self.random) else self.random,
            "of": len(self.candidates),
            "found": len(self.table),
            "sources": self.table["source"].value_counts().to_dict(),
            "meaning": self.explanation,
            "readings": json.loads(str(self.table.to_json(orient="records", double_precision=10))),
        }

    def to_result(self) -> dict[str, Any]:
        """Return what :func:`dctlib.runs.cache.remember` stores: JSON, and tensors beside it."""
        rest = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        table = json.loads(str(self.candidates.to_json(orient="split", double_precision=15)))
        return rest | {"candidates": table}

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> "FoundVectors":
        """Return what :meth:`to_result` was made from."""
        table = pd.DataFrame(**result["candidates"]).astype(dict.fromkeys(NUMBERS, float))
        completions = {int(row): texts for row, texts in result["completions"].items()}
        return cls(**{**result, "candidates": table, "completions": completions})

    @property
    def explanation(self) -> str:
        """What the result means, in a sentence or two."""
        reached = "none was left to compare" if math.isnan(self.random) else f"the best reaches {self.random:.2f}"
        if n := len(self.rows):
            count = f"{n} vectors" if n > 1 else "one vector"
            effect = (
                f"Under {count} the judge finds more completions of held-out requests True than without a vector"
                if self.judged
                else f"{count.capitalize()} make{'' if n > 1 else 's'} the model answer held-out requests that it "
                f"withholds an answer to"
            )
            return f"{effect}, within the bound on damage. {self._behaviours()}Of random directions, {reached}."
        if self.judged:
            return (
                "Nothing found: within the bound on damage, under no vector does the judge find more completions of "
                f"held-out requests True than without one. {_ELSEWHERE}"
            )
        return (
            "Nothing found: within the bound on damage, no vector makes the model answer held-out requests that it "
            f"withholds an answer to. The unsteered model withholds {self._withheld()} of its answers. A vector that "
            "only changes answers, such as a persona, needs a judge to be found; the candidates are ranked by how much "
            f"they change. {_ELSEWHERE}"
        )

    def _behaviours(self) -> str:
        if len(self.rows) == 1:
            return ""
        groups = self.candidates.loc[self.rows, "behaviour"].nunique()
        return "They make it say much the same. " if groups == 1 else f"They form {groups} behaviours. "

    def _withheld(self) -> str:
        column: Any = self.candidates["withheld"]
        share = float(column.max())
        return "an unknown share" if math.isnan(share) else f"{share:.0%}"


def is_above(table: pd.DataFrame, *, unsteered: float, margin: float) -> list[bool]:
    """Return whether each row's ``held_out`` is above the unsteered score and its ``elsewhere``, by a margin each."""
    elsewhere = table["elsewhere"].to_numpy(float)
    bound = np.fmax(elsewhere, unsteered)  # fmax skips NaN: with a judge, nothing was read elsewhere
    return (table["held_out"].to_numpy(float) >= bound + margin).tolist()


def describe_candidates(
    sources: Sequence[str],
    lengths: Sequence[float],
    halving: Halving,
    requests: Sequence[Instruction],
    finalists: pd.DataFrame,
    *,
    characters: int,
) -> pd.DataFrame:
    """Return ``FoundVectors.candidates``.

    Parameters
    ----------
    sources, lengths
        Of each row, its method and the length at which it was read last.
    requests : sequence of str or of conversations
        The requests of the halving. Each row shows the first of them.
    finalists : DataFrame
        The rows of :data:`COLUMNS` that were read on all requests, with ``found``, best first.
    """
    known = {"found": False, "source": sources, "length": lengths, "request": "", "says": ""}
    table = pd.DataFrame(known).reindex(columns=["found", *COLUMNS, "first"])
    last_round, change = pd.Series(0, index=table.index), pd.Series(0.0, index=table.index)
    for number, (rows, reading) in enumerate(halving.rounds):
        if number == 0:
            table.loc[rows, "first"] = reading.scores()
            change[rows] = reading.changes()
        last_round[rows] = number + 1
        table.loc[rows, "request"] = truncate(last_user_turn(requests[0]), characters)
        table.loc[rows, "says"] = [truncate(each[0], characters) for each in reading.completions]
    for name in finalists:
        table.loc[finalists.index, name] = finalists[name]
    behind = table.drop(finalists.index).assign(round=last_round, change=change)
    behind = behind.sort_values(["round", "first", "change"], ascending=False)
    found = finalists["found"].to_numpy(bool)
    order = [*finalists.index[found], *finalists.index[~found], *behind.index]
    return table.loc[order]


def grade_columns(reading: Reading) -> dict[str, list[float]]:
    """Return the mean of each grade over all requests."""
    return {name: getattr(reading.grades, name).float().mean(1).tolist() for name in _PARTS}


def excerpt_columns(
    reading: Reading, requests: Sequence[Instruction], held_out: slice, characters: int
) -> Mapping[str, list[str]]:
    """Return the held-out request on which each vector scores best, and its completion, both cut short."""
    best = reading.shown(held_out)
    return {
        "request": [truncate(last_user_turn(requests[i]), characters) for i in best],
        "says": [truncate(reading.completions[row][i], characters) for row, i in enumerate(best)],
    }
