"""Repetition, which perplexity cannot tell from fluent text, because a repeated word is likely."""

import re

from dctlib.evaluation.thoughts import answer_of

# A word, or one character of a script that writes no spaces: Thai to Khmer, kana, Han.
_UNIT = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+")
_MARKER = re.compile(r"^\s*(?:\d+[.)]|[-*•+]|#+)\s+", re.MULTILINE)  # marks a list's item, and numbers equal lines
_LAYOUT = re.compile(r"[-=_*#|:+~─━│\s]+")
_FIRST = 50  # words in which distinct ones are counted, because any long text repeats its words
_MIN_WORDS = 8  # a shorter answer cannot be told from a list or a name
# Three copies side by side, or two of at least four units.
_LOOP_OF_WORDS = re.compile(r"(.{1,99}?)\1{2,}|(.{4,199}?)\2", re.DOTALL)
_LOOP_OF_CHARACTERS = re.compile(r"(.{1,40}?)\1{3,}", re.DOTALL)


def is_repetitive(completion: str) -> bool:
    """Return whether loops make up at least half of an answer, or its beginning has few different words.

    A loop is a word, phrase or line three times in a row, a phrase of four words twice, or characters four times. Few
    means fewer than a quarter of the first 50 words, of which there must be at least eight.
    """
    text = _MARKER.sub("", answer_of(completion)).casefold()
    units = _UNIT.findall(text)
    names: dict[str, str] = {}
    words = "".join(names.setdefault(unit, chr(0x10000 + len(names))) for unit in units)
    characters = _LAYOUT.sub("", text) or "".join(text.split())
    first = units[:_FIRST]
    return (
        (len(first) >= _MIN_WORDS and 4 * len(set(first)) < len(first))
        or _share(_LOOP_OF_WORDS, words, 3) >= 0.5
        or _share(_LOOP_OF_CHARACTERS, characters, 8) >= 0.5
    )


def _share(loop: re.Pattern[str], text: str, least: int) -> float:
    """Return the fraction of a text that lies in loops of at least `least` characters."""
    looped = sum(len(found[0]) for found in loop.finditer(text) if len(found[0]) >= least)
    return looped / max(len(text), 1)
