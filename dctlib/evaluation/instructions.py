"""Instruction sets: the pinned ones, those that a user brings, and disjoint splits of them."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from dctlib._io import find_path
from dctlib.evaluation.prompt_files import FORMATS, read_prompt_file, unique
from dctlib.models.assets import fetch
from dctlib.models.chat import Instruction

Item = TypeVar("Item")


@dataclass(frozen=True)
class Split:
    """Disjoint parts of one instruction set, so that nothing is reported on what it was trained or ranked on."""

    train: list
    fit: list
    validation: list
    test: list

    def column(self, name: str) -> "Split":
        """Return the split of one column of its rows."""
        return Split(*([row[name] for row in part] for part in vars(self).values()))


def load_advbench(path: str | Path) -> list[dict[str, str]]:
    """Read the harmful instructions of AdvBench (Zou et al. 2023): rows with a ``goal`` and a ``target``."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def load_benign(path: str | Path) -> list[str]:
    """Read the instructions of an Alpaca-format file that need no further input."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    return [row["instruction"] for row in rows if not row["input"]]


def harmful_split() -> Split:
    """Return AdvBench's rows, ``goal`` and ``target``, in the split of every notebook; ``train`` trains organisms."""
    return split(load_advbench(fetch("advbench")))


def harmful_instructions() -> Split:
    """Return the instructions alone of :func:`harmful_split`."""
    return harmful_split().column("goal")


def benign_split() -> Split:
    """Return the benign instructions, split into test and train."""
    return split(load_benign(fetch("benign")), fit=0, validation=0)


def shuffled(items: Sequence[Item], *, seed: int) -> list[Item]:
    """Return a permutation of `items` that depends on `seed` alone."""
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


def read_instructions(prompts: str | Path | Sequence[Instruction], *, column: str | None = None) -> list[Instruction]:
    """Return the pinned ``harmful`` or ``benign`` instructions, those of a file, or a given list, each once.

    Parameters
    ----------
    prompts : str, path or sequence
        A pinned name; a file, see :func:`dctlib.evaluation.prompt_files.read_prompt_file`; or the instructions
        themselves, each a string or a conversation.
    column : str, optional
        Column of a CSV or TSV file, or key of a JSON file, that holds the instructions.

    Raises
    ------
    ValueError
        If there is no such file, or it holds no instructions, or `column` is named without such a file.
    """
    named = isinstance(prompts, str | Path)
    if column is not None and (not named or prompts in ("harmful", "benign")):
        raise ValueError(
            f"got column={column!r} without a file, expected a CSV, TSV, JSON or JSON-lines file as prompts"
        )
    if not named:
        return unique(prompts)
    if prompts == "harmful":
        pinned = harmful_instructions()
        return pinned.fit + pinned.validation
    if prompts == "benign":
        return benign_split().train
    try:
        return read_prompt_file(find_path(prompts) or Path(prompts), column=column)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read prompts={str(prompts)!r} ({error}); expected 'harmful', 'benign', or {FORMATS}"
        ) from error


def split_instructions(instructions: Sequence[Item], *, fit: int, held_out: int) -> tuple[list[Item], list[Item]]:
    """Return the first `fit` instructions, to fit on, and the next `held_out`, to measure on.

    Raises
    ------
    ValueError
        If there are fewer than both together.
    """
    if fit < 1 or held_out < 1 or len(instructions) < fit + held_out:
        raise ValueError(
            f"got {len(instructions)} instructions, expected at least {fit} to fit and {held_out} to measure on; give "
            f"more, or lower fit_prompts and validation"
        )
    return list(instructions[:fit]), list(instructions[fit : fit + held_out])
