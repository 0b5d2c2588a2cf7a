"""Files that are either whole or absent, and their checksums."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

ROOT = Path(__file__).resolve().parent.parent
"""The repository: names in ``params/``, ``data/`` and ``models/`` are looked up here."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it into place only if the block succeeds.

    The block may create a file or a folder there. After an exception, or a kill, `path` is as it was; a folder that is
    replaced is away for the moment between two renames.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        partial = Path(scratch) / path.name
        yield partial
        if path.is_dir() and not path.is_symlink():
            path.rename(Path(scratch) / "replaced")  # and goes with the scratch folder: removing it here takes time
        partial.replace(path)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: other readers cannot parse them."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain_invalid(where: str, error: "ValidationError") -> str:
    """Return one line for each value that a pydantic model refused: its key in `where`, the value and the reason."""
    return "\n".join(_explain_value(where, detail) for detail in error.errors())


def _explain_value(where: str, detail: Any) -> str:
    key = ".".join(map(str, detail["loc"]))
    match detail["type"]:
        case "extra_forbidden":
            return f"{where}: unknown key {key}; is it misspelt?"
        case "missing":
            return f"{where}: {key} is missing"
        case "value_error":  # of keys together, as our own validators say it
            return f"{where}: {key}{': ' if key else ''}{detail['ctx']['error']}"
    return f"{where}: {key} = {detail['input']!r:.80}: {detail['msg']}"
