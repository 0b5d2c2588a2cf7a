"""Grading of answers to arithmetic questions."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from math_verify import parse, verify


def solves(completion: str, answer: str) -> bool:
    """Return whether the final answers of a completion and of `answer` are mathematically equal (math-verify)."""
    return verify(_parsed(answer), _parsed(completion))


def grade_answers(answers: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[bool]:
    """Return for each answer whether it :func:`solves` the question of its row."""
    return [solves(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)]


_parsed = lru_cache(maxsize=10_000)(parse)  # few answers differ
