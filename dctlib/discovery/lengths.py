"""Lengths of steering vectors: the longest one that does little damage."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SHORTEST, LONGEST = 0.25, 1.4
"""The range of lengths, in units of R."""

Measure = Callable[[Float[Tensor, "k d"]], Float[Tensor, " k"]]

_FIRST = 0.7
_STEPS = 4
_AIM, _CLOSE = 0.95, 0.9  # fractions of the bound: the aim, and what suffices


def estimate_lengths(measure: Measure, vectors: Float[Tensor, "k d"], max_damage: float) -> list[float]:
    """Return the multiple of each vector whose damage is about the bound, if it grows with the square of the length.

    One measurement is made, at multiple 0.7. For the parameters see :func:`longest_within`.
    """
    damages = measure(_FIRST * vectors).tolist()
    return [_clip(_FIRST * math.sqrt(max_damage / max(damage, 1e-9))) for damage in damages]


def longest_within(
    measure: Measure, vectors: Float[Tensor, "k d"], max_damage: float, *, start: Sequence[float]
) -> list[float]:
    """Return the largest multiple of each vector, 0.25 to 1.4, whose damage is within a bound; 0 if there is none.

    Damage is taken to grow with length. It is measured at `start` and then, up to three times, where the line through
    the logarithms of two measurements meets the bound. Nine tenths of the bound suffice.

    Parameters
    ----------
    measure : callable
        From vectors, (j, d), to their damage, (j,).
    vectors : Tensor, (k, d)
        At multiple 1.
    max_damage : float
        The bound, in the units of `measure`.
    start : sequence of float
        The multiple of each vector at which to begin.
    """
    brackets = [_Bracket(_clip(multiple)) for multiple in start]
    for _ in range(_STEPS):
        open_ones = [(row, each) for row, each in enumerate(brackets) if not each.is_closed(max_damage)]
        if not open_ones:
            break
        multiples = [each.next_multiple(max_damage) for _, each in open_ones]
        scaled = torch.stack([multiple * vectors[row] for (row, _), multiple in zip(open_ones, multiples, strict=True)])
        for (_, each), multiple, damage in zip(open_ones, multiples, measure(scaled).tolist(), strict=True):
            each.add(multiple, damage, max_damage)
    return [each.low for each in brackets]


def _clip(multiple: float) -> float:
    return min(max(multiple, SHORTEST), LONGEST) if math.isfinite(multiple) else SHORTEST


@dataclass
class _Bracket:
    """The longest multiple known to be within the bound, the shortest known to be beyond it, and their damage."""

    start: float
    low: float = 0.0
    low_damage: float = 0.0
    high: float = math.inf
    high_damage: float = math.inf

    def is_closed(self, max_damage: float) -> bool:
        return self.low >= LONGEST or self.high <= SHORTEST or self.low_damage >= _CLOSE * max_damage

    def add(self, multiple: float, damage: float, max_damage: float) -> None:
        if damage <= max_damage:
            self.low, self.low_damage = multiple, damage
        else:  # also if damage is not a number
            self.high, self.high_damage = multiple, damage

    def next_multiple(self, max_damage: float) -> float:
        aim = _AIM * max_damage
        if self.high == math.inf and self.low == 0:
            return self.start
        if self.high == math.inf:  # damage grows at least with the square at first
            return min(LONGEST, self.low * math.sqrt(aim / max(self.low_damage, aim / 16)))
        if self.low == 0:
            share = aim / self.high_damage if math.isfinite(self.high_damage) else 0.0
            return max(SHORTEST, self.high * share)
        place = 0.5
        if self.low_damage > 0 and math.isfinite(self.high_damage):
            place = math.log(aim / self.low_damage) / math.log(self.high_damage / self.low_damage)
        return self.low * (self.high / self.low) ** min(max(place, 0.1), 0.9)
