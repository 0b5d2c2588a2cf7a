"""What a search returns: vectors at their lengths, and a table of what they do."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from dctlib.discovery.criteria import Grades
from dctlib.discovery.reading import Reading
from dctlib.evaluation.judges import truncate
from dctlib.models.chat import Instruction, last_user_turn

_PARTS = [field.name for field in dataclasses.fields(Grades)]
COLUMNS = ["source", "multiple", "length", "damage", "score", "held_out", "elsewhere", *_PARTS, "request", "says"]


@dataclass(frozen=True, eq=False)
class FoundVectors:
    """Vectors that do something, best first; there may be none.

    Attributes
    ----------
    vectors : Tensor, (k, d)
        Each at its own length, float32 on the CPU: ``steer(model, layer=found.layer, vector=found.vectors[0])``.
    layer : int
        Where they are added.
    table : DataFrame
        A row for each vector: ``source``, the method that found it; ``multiple``, its ``length`` in units of R;
        ``damage``, in nats a token; ``score``, on all validation requests; ``held_out``, on those that the search did
        not use; ``elsewhere``, on harmless requests, NaN with a judge; the means of the grades by
        :class:`dctlib.discovery.criteria.Grades`; and ``request`` and ``says``, one held-out request and its
        completion, cut short.
    null : float
        The best ``held_out`` of as many random vectors that went the same way, and of the unsteered model.
    input_scale : float
        R.
    """

    vectors: Float[Tensor, "k d"]
    layer: int
    table: pd.DataFrame
    null: float
    input_scale: float

    @property
    def explanation(self) -> str:
        """What the result means, in a sentence or two."""
        if len(self.table):
            return (
                f"{len(self.table)} vectors do more to held-out requests than the best random vector of their lengths "
                f"({self.null:.2f}), within the bound on damage."
            )
        return (
            "Nothing found: within the bound on damage, no vector does more to held-out requests than random vectors "
            "of the same length, or than it does to harmless requests. The model may hide nothing here, or a wider "
            "fit, another slice, other requests or a larger max_damage may show it."
        )


def rows_above(table: pd.DataFrame, *, null: float, margin: float) -> list[int]:
    """Return the places of rows whose ``held_out`` is above the null and above ``elsewhere``, by a margin each."""
    bound = table["elsewhere"].fillna(null).clip(lower=null)  # with a judge, nothing was read elsewhere
    return np.flatnonzero(table["held_out"] >= bound + margin).tolist()


def grade_columns(reading: Reading, k: int) -> dict[str, list[float]]:
    """Return the mean of each grade over all requests, for the first `k` vectors."""
    grades = reading.grades
    return {name: getattr(grades, name)[:k].float().mean(1).tolist() for name in _PARTS}


def excerpt_columns(
    reading: Reading, requests: Sequence[Instruction], held_out: slice, k: int, characters: int
) -> dict[str, list[str]]:
    """Return the held-out request on which each of `k` vectors scores best, and its completion, both cut short."""
    best = [held_out.start + place for place in reading.each[:k, held_out].argmax(1).tolist()]
    return {
        "request": [truncate(last_user_turn(requests[i]), characters) for i in best],
        "says": [truncate(reading.completions[row][i], characters) for row, i in enumerate(best)],
    }
