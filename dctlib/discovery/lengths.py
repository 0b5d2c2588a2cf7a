"""Lengths of steering vectors: the one that scores best of those that do little damage."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dctlib.discovery.damage import measure_damage
from dctlib.discovery.pool import Pool
from dctlib.discovery.reading import Reader
from dctlib.evaluation.selection import Candidate
from dctlib.models.chat import Instruction
from dctlib.models.likelihood import Example

MULTIPLES = (0.35, 0.5, 0.7, 1.0, 1.4)
"""Lengths in units of R at which damage is measured, shortest first."""

_BISECTIONS = 2
_TRIED = 3  # lengths of each vector that are read, the longest ones within the bound


def choose_lengths(
    reader: Reader,
    requests: Sequence[Instruction],
    examples: Sequence[Example],
    pool: Pool,
    rows: Sequence[int],
    *,
    max_damage: float,
    max_new_tokens: int,
) -> list[Candidate]:
    """Return vectors of a pool at the length that scores best of those within the bound on damage, best vector first.

    Vectors that no length keeps within the bound are left out.

    Parameters
    ----------
    requests : sequence of str or of conversations
        What each vector is read on at up to three lengths.
    examples : sequence of Example
        Answers on which damage is measured.
    rows : sequence of int
        Rows of the pool.
    max_damage : float
        In nats a token.
    max_new_tokens : int
        Tokens of a completion.
    """
    measure = partial(measure_damage, reader.model, reader.tokenizer, examples, layer=reader.layer)
    limits = longest_within(measure, pool.input_scale * pool.directions[rows], max_damage).tolist()
    tried = [(row, multiple) for row, limit in zip(rows, limits, strict=True) for multiple in _lengths_up_to(limit)]
    candidates = [
        Candidate(reader.layer, multiple * pool.input_scale * pool.directions[row], pool.sources[row], multiple)
        for row, multiple in tried
    ]
    if not candidates:
        return []
    reading = reader.read(requests, stack_vectors(candidates), max_new_tokens=max_new_tokens)
    best: dict[int, Candidate] = {}
    for place in reading.order():  # equals stay in their order, the shorter length first
        best.setdefault(tried[place][0], candidates[place])
    return [*best.values()]


def stack_vectors(candidates: Sequence[Candidate]) -> Float[Tensor, "k d"]:
    """Return the vectors of `candidates` as rows."""
    return torch.stack([candidate.vector for candidate in candidates])


def _lengths_up_to(limit: float) -> list[float]:
    """Return the largest multiples that were measured within the bound, shortest first; none for a limit of 0."""
    return [*(multiple for multiple in MULTIPLES if multiple < limit), limit][-_TRIED:] if limit else []


def longest_within(
    measure: Callable[[Float[Tensor, "k d"]], Float[Tensor, " k"]],
    vectors: Float[Tensor, "k d"],
    max_damage: float,
) -> Float[Tensor, " k"]:
    """Return the largest multiple of each vector up to which its damage stays within a bound, 0 if none does.

    Damage is measured at rising :data:`MULTIPLES`, up to a vector's first that is beyond the bound. So a damage that
    falls again further on does not count. The gap before the first is halved twice, by geometric means.

    Parameters
    ----------
    measure : callable
        From vectors, (j, d), to their damage, (j,).
    vectors : Tensor, (k, d)
        At multiple 1.
    max_damage : float
        The bound, in the units of `measure`.
    """
    within, beyond = torch.zeros(len(vectors)), torch.full((len(vectors),), torch.nan)

    def measure_at(rows: Tensor, multiples: Tensor) -> Tensor:
        if not len(rows):
            return rows
        harmless = measure(multiples[:, None] * vectors[rows]) <= max_damage
        within[rows[harmless]] = multiples[harmless]
        beyond[rows[~harmless]] = multiples[~harmless]
        return rows[harmless]

    climbing = torch.arange(len(vectors))
    for multiple in MULTIPLES:
        climbing = measure_at(climbing, torch.full((len(climbing),), multiple))
    between = torch.nonzero((within > 0) & beyond.isfinite()).flatten()
    for _ in range(_BISECTIONS):
        measure_at(between, (within * beyond).sqrt()[between])
    return within
