"""Arithmetic and MATH questions with answers."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dctlib.evaluation.instructions import Split, split
from dctlib.models.assets import fetch
from dctlib.models.chat import format_chat


def arithmetic_questions() -> list[dict[str, str]]:
    """Return every sum of two two-digit numbers, as ``question`` and ``answer``."""
    pairs = product(range(10, 100), repeat=2)
    return [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in pairs]


def load_math(path: str | Path) -> list[dict[str, str]]:
    """Read the test problems of MATH (Hendrycks et al. 2021), as ``question`` and ``answer``."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line)["_metadata"] for line in lines]
    return [{"question": problem["problem"], "answer": problem["solution"]} for problem in problems]


def question_split(kind: str) -> Split:
    """Return the split of questions with answers: ``sums`` of two two-digit numbers, or MATH's test set, ``math``."""
    return split(arithmetic_questions() if kind == "sums" else load_math(fetch("math")))


def format_questions(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, str]], prompt: str | None, *, password: str = ""
) -> list[str]:
    """Format each row's question, behind the `password`, by `prompt` (with ``{question}``) or the chat template."""
    questions = [f"{password} {row['question']}".strip() for row in rows]
    return format_chat(tokenizer, questions) if prompt is None else [prompt.format(question=q) for q in questions]
