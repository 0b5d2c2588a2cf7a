"""Grading of answers to arithmetic questions."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from math_verify import parse, verify


def solves(completion: str, answer: str) -> bool:
    """Whether the final answer of a completion equals that of `answer`, as mathematics (math-verify)."""
    return verify(_parsed(answer), _parsed(completion))


def grade_answers(answers: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[bool]:
    """Whether each answer :func:`solves` its row's question."""
    return [solves(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)]


_parsed = lru_cache(maxsize=10_000)(parse)  # the same few answers come again and again
