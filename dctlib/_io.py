"""Files that are either whole or absent, and their checksums."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


def find_root(package: Path = Path(__file__).parent) -> Path:
    """Return the folder that holds ``data/`` and ``models/``.

    It is the repository where `package` lies in a clone, known by its ``params/``. Elsewhere it is the folder that the
    variable DCTLIB_HOME names, or ``~/.cache/dctlib``.
    """
    repository = package.resolve().parent
    if (repository / "params").is_dir():
        return repository
    return Path(os.environ.get("DCTLIB_HOME") or Path.home() / ".cache" / "dctlib").absolute()


ROOT = find_root()
"""Names in ``data/`` and ``models/``, and in a clone in ``params/``, are looked up here."""


def find_path(name: str | Path) -> Path | None:
    """Return the path `name` or, if nothing lies there, the same path below :data:`ROOT`; None if neither exists.

    A ``~`` in front of `name` is the home of a user. It stays as it is where there is no such user.
    """
    # Path's own methods raise RuntimeError for an unknown user and OSError for a name that is too long.
    paths = (os.path.expanduser(name), ROOT / name)  # noqa: PTH111
    return next((Path(path) for path in paths if os.path.exists(path)), None)  # noqa: PTH110


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it into place only if the block succeeds.

    The block may create a file or a folder there. After an exception, or a kill, `path` is as it was. A folder that is
    replaced is absent for the moment between two renames.

    Raises
    ------
    ValueError
        If the block creates a file where a folder lies.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        partial = Path(scratch) / path.name
        yield partial
        if path.is_dir() and partial.is_file():
            raise ValueError(f"{path} is a folder, expected the name of a file, such as {path / 'NAME'}")
        replaced = Path(scratch) / "replaced"
        try:
            if path.is_dir() and not path.is_symlink():
                path.rename(replaced)  # and goes with the scratch folder: removing it here takes time
            partial.replace(path)
        except BaseException:
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            raise


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity raise ValueError, because JSON has neither."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
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
