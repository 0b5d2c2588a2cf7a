"""The instructions that a user brings: from a list, a text file or the pinned sets, parted for fitting and reading."""

import re
from collections.abc import Sequence

from dctlib.prompts import benign_split, harmful_instructions
from dctlib.store import ROOT


def instructions_of(prompts: str | Sequence[str]) -> list[str]:
    """Instructions: the pinned ``harmful`` or ``benign`` ones, the lines of a text file, or those that are given.

    Raises
    ------
    ValueError
        If there is no such file, or it is not text.
    """
    if not isinstance(prompts, str):
        return list(prompts)
    if prompts == "harmful":
        pinned = harmful_instructions()
        return pinned.fit + pinned.validation
    if prompts == "benign":
        return benign_split().train
    try:
        content = (ROOT / prompts).read_bytes()  # an absolute path stays what it is
        text = content.decode("utf-8-sig")  # not by read_text, which takes half a byte-order mark for an empty file
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read prompts={prompts!r} ({error}); expected 'harmful', 'benign', or a text file with an "
            f"instruction a line"
        ) from error
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]


def parted(instructions: Sequence[str], *, fit: int, held_out: int) -> tuple[list[str], list[str]]:
    """The first `fit` instructions, to fit, and the `held_out` that follow, to measure and read.

    Raises
    ------
    ValueError
        If there are fewer.
    """
    if fit < 1 or held_out < 1 or len(instructions) < fit + held_out:
        raise ValueError(
            f"got {len(instructions)} instructions, expected at least {fit} to fit and {held_out} to measure on; give "
            f"more, or lower fit_prompts and validation"
        )
    return list(instructions[:fit]), list(instructions[fit : fit + held_out])
