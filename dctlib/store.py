"""Files that are either whole or absent, and results remembered under a hash of what they were made from."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

ROOT = Path(__file__).resolve().parent.parent
"""The repository: names in ``params/``, ``data/`` and ``models/`` are looked up here."""


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
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
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(inputs: dict[str, Any], modules: Sequence[str]) -> str:
    """Hash of JSON-able `inputs`, of the dctlib modules that turn them into numbers, and of two packages' releases."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, allow_nan=False).encode())
    digest.update(f"{version('torch')} {version('transformers')}".encode())
    for module in modules:
        digest.update((Path(__file__).parent / f"{module}.py").read_bytes())
    return digest.hexdigest()[:32]


def remember(
    folder: str | Path,
    inputs: dict[str, Any],
    modules: Sequence[str],
    make: Callable[[], Result],
    *,
    save: Callable[[Result, Path], object] = lambda value, path: path.write_text(json.dumps(value)),
    load: Callable[[Path], Result] = lambda path: json.loads(path.read_text()),
) -> Result:
    """Return what `make` gave for these `inputs`, calling it only the first time.

    Parameters
    ----------
    folder : path
        Where results lie, one file each, named by :func:`key_of` and by what it holds: a damaged one is made again.
    inputs : dict
        Everything that the result depends on, as JSON: parameters, seeds, texts, and the model's digest.
    modules : sequence of str
        The dctlib files that it depends on. Editing one makes the result stale.
    make : callable
        Computes the result. A run killed inside it leaves nothing; the next run calls it again.
    save, load : callable
        How a result becomes a file and back; JSON unless told otherwise.
    """
    folder, key = Path(folder), key_of(inputs, modules)
    for path in folder.glob(f"{key}.*"):
        if path.name == f"{key}.{sha256(path)[:16]}":
            return load(path)
        path.unlink()  # damaged
    with whole(folder / key) as partial:
        save(make(), partial)
    return load((folder / key).rename(folder / f"{key}.{sha256(folder / key)[:16]}"))
