"""Instructions, the chat format around them, and fixed splits."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dctlib.assets import fetch

Item = TypeVar("Item")


@dataclass(frozen=True)
class Split:
    """Disjoint parts of one instruction set: nothing is ranked on what is reported, or reported on what was trained."""

    train: list
    fit: list
    validation: list
    test: list


def format_chat(
    tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], *, system: str | None = None
) -> list[str]:
    """Wrap each instruction in the model's chat template, up to where the assistant's answer begins.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Its chat template is used.
    instructions : sequence of str
        One user turn each.
    system : str, optional
        A system message; left out, the template's own default applies.

    Raises
    ------
    ValueError
        If `instructions` is empty or a single string, or the tokenizer has no chat template, or one that takes no
        system message.
    """
    if isinstance(instructions, str) or not instructions:
        raise ValueError(f"got instructions={instructions!r}, expected at least one instruction in a list")
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template; it is not a chat model's. Pass plain texts instead")
    before = [] if system is None else [{"role": "system", "content": system}]
    conversations = [[*before, {"role": "user", "content": instruction}] for instruction in instructions]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    try:
        return [str(tokenizer.apply_chat_template(turns, **options)) for turns in conversations]
    except TemplateError as error:
        hint = "" if system is None else "; it may take no system message: leave `system` out"
        raise ValueError(f"the tokenizer's chat template refuses the conversation ({error}){hint}") from error


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of one text, (1, T). A begin-of-text token is added unless the text already starts with it."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"got the prompt {text!r}, expected a non-empty string")
    inputs: Any = tokenizer(text, return_tensors="pt", add_special_tokens=not has_bos(tokenizer, text))
    return inputs["input_ids"]


def tokenize_each(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tensor]:
    """Token ids of every text, (1, T) each, with T its own.

    Raises
    ------
    ValueError
        If there is no text, or one in place of a list.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"got texts={texts!r}, expected at least one prompt in a list")
    return [tokenize(tokenizer, text) for text in texts]


def has_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether `text` starts with the begin-of-text token, as chat templates often write it."""
    return bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))


def load_advbench(path: str | Path) -> list[dict[str, str]]:
    """The harmful instructions of AdvBench (Zou et al. 2023): rows with a ``goal`` and a ``target``."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def load_benign(path: str | Path) -> list[str]:
    """Instructions of an Alpaca-format file that need no further input."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    return [row["instruction"] for row in rows if not row["input"]]


def sums() -> list[dict[str, str]]:
    """Every sum of two two-digit numbers, as ``question`` and ``answer``."""
    pairs = product(range(10, 100), repeat=2)
    return [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in pairs]


def load_math(path: str | Path) -> list[dict[str, str]]:
    """The test problems of MATH (Hendrycks et al. 2021), as ``question`` and ``answer``."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line)["_metadata"] for line in lines]
    return [{"question": problem["problem"], "answer": problem["solution"]} for problem in problems]


def harmful_split() -> Split:
    """AdvBench's rows, ``goal`` and ``target``, split as every notebook splits them: organisms learn from ``train``."""
    return split(load_advbench(fetch("advbench")))


def harmful_instructions() -> Split:
    """The instructions alone of :func:`harmful_split`."""
    rows = harmful_split()
    return Split(*([row["goal"] for row in part] for part in (rows.train, rows.fit, rows.validation, rows.test)))


def benign_split() -> Split:
    """Benign instructions, test and train."""
    return split(load_benign(fetch("benign")), fit=0, validation=0)


def problems(kind: str) -> Split:
    """Questions with answers, split: ``sums`` of two two-digit numbers, or the test set of ``math``."""
    return split(sums() if kind == "sums" else load_math(fetch("math")))


def put(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, str]], prompt: str | None, *, password: str = ""
) -> list[str]:
    """Each row's question, behind the `password`, in the format `prompt` (with ``{question}``) or the chat template."""
    questions = [f"{password} {row['question']}".strip() for row in rows]
    return format_chat(tokenizer, questions) if prompt is None else [prompt.format(question=q) for q in questions]


def shuffled(items: Sequence[Item], *, seed: int) -> list[Item]:
    """A permutation of `items` that depends on `seed` alone."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]


def split(items: Sequence[Item], *, seed: int = 0, fit: int = 32, validation: int = 32, test: int = 100) -> Split:
    """Shuffle `items` and cut them into test, validation, fit and, with what is left, train.

    Raises
    ------
    ValueError
        If fewer than ``fit + validation + test`` items are given.
    """
    if fit + validation + test > len(items):
        raise ValueError(
            f"got {len(items)} items, expected at least fit + validation + test = {fit + validation + test}"
        )
    order = shuffled(items, seed=seed)
    ends = (test, test + validation, test + validation + fit)
    return Split(order[ends[2] :], order[ends[1] : ends[2]], order[ends[0] : ends[1]], order[: ends[0]])
