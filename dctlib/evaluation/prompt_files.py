"""Files of instructions that a user brings: text, CSV, TSV, JSON and JSON lines."""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dctlib.models.chat import Instruction, as_turns

COLUMNS = (
    *("goal", "instruction", "instructions", "prompt", "prompts", "question", "questions", "text", "behavior"),
    *("behaviour", "request", "query", "input", "user", "messages", "conversation", "conversations", "content"),
)
"""Names of columns that hold instructions: where none is named, the first of these is taken."""

FORMATS = "a .txt, .csv, .tsv, .json or .jsonl file in UTF-8, or in UTF-16 with its byte-order mark"

_ENCODINGS = {  # by byte-order mark, the longer ones first because they begin with a shorter one
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
_MARKUP = re.compile(r"\s*(?:<!doctype|<html|<\?xml|\{\\rtf|%PDF-)", re.IGNORECASE)
_TURNS = re.compile(r"""\s*\[?\s*\{\s*['"](?:role|from)['"]\s*:""")


def read_prompt_file(path: Path, *, column: str | None = None) -> list[Instruction]:
    """Return the instructions of a file, each once, in its order.

    The suffix names the format. A ``.txt`` file, or one without a suffix, holds an instruction a line. A ``.csv`` or
    ``.tsv`` file has a header. A ``.json`` file holds a list, and a ``.jsonl`` file a value a line: strings, objects
    with the column, or conversations. Blank lines and cells are left out.

    Parameters
    ----------
    column : str, optional
        Column or key that holds the instructions. Left out, the first of :data:`COLUMNS` that is there.

    Raises
    ------
    ValueError
        If the file is binary, empty, of another format than its suffix says, or without such a column; or if an item
        is neither text nor a conversation that the model is to answer.
    OSError
        If it cannot be read.
    """
    suffix = path.suffix.lower()
    content = path.read_bytes()
    if suffix not in _READERS:
        raise ValueError(f"it ends in {suffix}")
    instructions = unique(_READERS[suffix](_decode(content), column))
    if not instructions:
        raise ValueError("it holds no instruction")
    for number, instruction in enumerate(instructions, start=1):
        _check(instruction, number)
    return instructions


def unique(instructions: Iterable[Instruction]) -> list[Instruction]:
    """Return each instruction once, so that none is both fitted and held out."""
    return list({json.dumps(each, default=str): each for each in instructions}.values())


def _check(instruction: Instruction, number: int) -> None:
    json.dumps(instruction, ensure_ascii=False).encode()  # half a surrogate pair raises
    if isinstance(instruction, str):
        if _TURNS.match(instruction):
            raise ValueError(
                f"instruction {number} is the text of a conversation, {instruction!r:.100}; save conversations as "
                f"lists of turns in a .jsonl file"
            )
    elif as_turns(instruction)[-1]["role"] == "assistant":
        raise ValueError(
            f"conversation {number} ends with the assistant's answer, {instruction!r:.200}, expected one that ends "
            f"where the model is to answer"
        )


def _decode(content: bytes) -> str:
    encoding = next((name for mark, name in _ENCODINGS.items() if content.startswith(mark)), "utf-8-sig")
    text = content.decode(encoding)
    if found := _CONTROL.search(text):
        raise ValueError(f"it is binary: it holds the control character {found[0]!r}")
    if _MARKUP.match(text):
        raise ValueError(f"it is a document that begins with {text.strip()[:9]!r}")
    return text


def _read_lines(text: str, column: str | None) -> list[Instruction]:
    if column is not None:
        raise ValueError(f"got column={column!r}, but a text file has no columns")
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    if lines and (suffix := _structure(text, lines)):
        raise ValueError(f"it holds {suffix[1:].upper()} and not an instruction a line: name it {suffix}")
    return list(lines)


def _structure(text: str, lines: list[str]) -> str:
    """Return the suffix that fits the structure of a text, or an empty string for plain lines."""
    if lines[0] in ("[", "{") or (len(lines) > 1 and isinstance(_parse(text), list | dict)):
        return ".json"
    if isinstance(_parse(lines[0]), list | dict) or all(isinstance(_parse(line), str) for line in lines):
        return ".jsonl"
    for delimiter, suffix in ((",", ".csv"), (";", ".csv"), ("\t", ".tsv")):
        header = {name.strip(' "').casefold() for name in lines[0].split(delimiter)}
        counts = [line.count(delimiter) for line in lines]
        if header & set(COLUMNS) and len(lines) > 1 and min(counts) >= counts[0]:
            return suffix
    return ""


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError:
        return None


def _read_table(text: str, column: str | None, *, delimiters: str) -> list[Instruction]:
    delimiter = max(delimiters, key=text.split("\n", 1)[0].count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header, *cells = [row for row in rows if any(cell.strip() for cell in row)] or [[]]
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from error
    if not header:
        return []
    place = header.index(_column(header, column))
    for number, row in enumerate(cells, start=1):
        if len(row) <= place or any(cell.strip() for cell in row[len(header) :]):
            raise ValueError(
                f"row {number} has {len(row)} cells under a header of {len(header)}, {row!r:.100}; put double quotes "
                f"around text with {delimiter!r} in it"
            )
    return [row[place].strip() for row in cells if row[place].strip()]


def _column(names: Sequence[str], column: str | None) -> str:
    """Return the one of `names` that holds instructions."""
    for wanted in COLUMNS if column is None else (column,):
        found = [name for name in names if name == wanted] or [
            name for name in names if name.strip().casefold() == wanted.strip().casefold()
        ]
        if len(found) > 1:
            raise ValueError(f"it has {len(found)} columns {wanted!r}, expected one")
        if found:
            return found[0]
    listed = ", ".join(f"{name:.40}" for name in names)
    expected = f"a column {column!r}" if column is not None else "a header with a column such as goal, prompt or text"
    raise ValueError(f"its columns are {listed}, expected {expected}; name one of them as `column`")


def _read_json(text: str, column: str | None) -> list[Instruction]:
    if not text.strip():
        return []
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        lines = [line for line in text.split("\n") if line.strip()]
        hint = "; with a value on each line, name it .jsonl" if _parse(lines[0]) is not None else ""
        raise ValueError(f"it is not JSON: {error}{hint}") from error
    if not isinstance(values, list):
        keys = f" with the keys {', '.join(values)}" if isinstance(values, dict) else ""
        raise ValueError(f"it holds one {type(values).__name__}{keys}, expected a list")
    return _read_values(values, column)


def _read_json_lines(text: str, column: str | None) -> list[Instruction]:
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
    return _read_values(values, column)


def _read_values(values: list[Any], column: str | None) -> list[Instruction]:
    """Return strings and conversations as they are, and from each object its column."""
    key = None
    instructions = []
    for number, value in enumerate(values, start=1):
        if isinstance(value, dict):
            if {"role", "content"} <= set(value):
                raise ValueError(
                    f"item {number} is a turn; put the turns of each conversation into a list of their own"
                )
            key = _column(list(value), column) if key is None else key
            if key not in value:
                raise ValueError(
                    f"item {number} has the keys {', '.join(value)}, expected {key!r} as in the ones before"
                )
            value = value[key]
        elif column is not None:
            raise ValueError(f"got column={column!r}, but item {number} is {value!r:.100}, which has no columns")
        if not isinstance(value, str | list | None):
            raise ValueError(f"item {number} is {value!r:.100}, expected text or a list of turns")
        if isinstance(value, list):
            as_turns(value)
        instructions.append(value.strip() if isinstance(value, str) else value)
    return [instruction for instruction in instructions if instruction]


_READERS: dict[str, Callable[[str, str | None], list[Instruction]]] = {
    **dict.fromkeys(("", ".txt", ".text"), _read_lines),
    ".csv": partial(_read_table, delimiters=",;\t"),
    ".tsv": partial(_read_table, delimiters="\t"),
    ".json": _read_json,
    **dict.fromkeys((".jsonl", ".ndjson"), _read_json_lines),
}
