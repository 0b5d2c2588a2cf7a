"""Where a model's files are: a pinned model, a folder, a GGUF file, or a repository of the Hub."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import hf_hub_download, try_to_load_from_cache

from dctlib._io import ROOT, find_path
from dctlib.models import assets

_HUB_ID = r"\w[\w.-]*(/[\w.-]+)?"

_HUB_FILE = r"(\w[\w.-]*/[\w.-]+)/(.+\.gguf)"


@dataclass(frozen=True)
class Source:
    """The files of a model, or of an adapter for one.

    Attributes
    ----------
    location : str
        What ``from_pretrained`` takes: a folder or a Hub id; or else a GGUF file.
    revision : str or None
        The commit on the Hub.
    files : frozenset of str
        Names of the files there, relative to it.
    """

    location: str
    revision: str | None
    files: frozenset[str]

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained`` besides the location; remote code is never run."""
        return {"trust_remote_code": False} | ({"revision": self.revision} if self.revision else {})

    @property
    def gguf(self) -> Path | None:
        """The file, if it is a GGUF file."""
        return Path(self.location) if self.location.endswith(".gguf") else None

    def has(self, pattern: str) -> bool:
        """Return whether a file's whole name matches a regular expression."""
        return any(re.fullmatch(pattern, name) for name in self.files)

    def fetch(self, name: str) -> Path:
        """Return the path of one file, downloaded if it lies on the Hub."""
        if (path := Path(self.location) / name).exists():
            return path
        return Path(hf_hub_download(self.location, name, revision=self.revision))


_MODEL = r"(adapter_)?config\.json"

TOKENIZER = r"(tokenizer|vocab|spiece).*"
"""What the name of a tokenizer's file matches."""


def find_source(name: str | Path, *, of: str = _MODEL) -> Source:
    """Return where the files of `name` are, as :func:`dctlib.load_model` takes it. Nothing large is downloaded.

    Parameters
    ----------
    of : str
        A regular expression for the name of a file that a folder has to hold.

    Raises
    ------
    ValueError
        If there is no such file, folder or repository, or a pinned model cannot be made.
    """
    if str(name) in assets.MODELS:
        return _folder(assets.fetch_model(str(name)), of)
    if path := find_path(name):
        return _file(path) if path.is_file() else _folder(path, of)
    location, _, revision = str(name).partition("@")
    local = location.startswith("models/")
    if not local and (parts := re.fullmatch(_HUB_FILE, location)):
        repository = _repository(parts[1], revision)
        if parts[2] not in repository.files:
            raise ValueError(f"{parts[1]} on the Hub has no {parts[2]}, expected one of {_ggufs(repository)}")
        return _file(repository.fetch(parts[2]))
    if local or location.endswith(".gguf") or not re.fullmatch(_HUB_ID, location):
        raise ValueError(
            f"no model folder or file {name}; `dvc repro` makes organisms (`make beyond` those of other seeds or with "
            f"a secret). Or pass one of {sorted(assets.MODELS)}, a Hub id, a GGUF file or a folder that "
            f"save_pretrained wrote"
        )
    return _repository(location, revision)


def _file(path: Path) -> Source:
    if path.suffix != ".gguf":
        raise ValueError(f"got the file {path}, expected a GGUF file or the folder of a saved model; try {path.parent}")
    return Source(str(path), None, frozenset({path.name}))


def _folder(path: Path, of: str = _MODEL) -> Source:
    files = frozenset(child.name for child in path.iterdir())
    source = Source(str(path), None, files)
    if source.has(of):
        return source
    if source.has(r".*\.gguf"):
        raise ValueError(f"{path} is a folder of GGUF files; pass one of them: {_ggufs(source)}")
    if of != _MODEL:
        raise ValueError(f"{path} is a folder without a tokenizer's files; pass one that has them")
    raise ValueError(f"{path} is a folder without config.json, so not a saved model; run its stage to the end")


def _ggufs(source: Source) -> str:
    return ", ".join(sorted(name for name in source.files if name.endswith(".gguf"))) or "none"


def _repository(repository: str, revision: str) -> Source:
    """Return a repository of the Hub, or its local copy if the Hub does not answer."""
    try:
        info = huggingface_hub.model_info(repository, revision=revision or None, timeout=10)
        files = frozenset(file.rfilename for file in info.siblings or ())
        return Source(repository, revision or info.sha, files)
    except Exception as error:  # network, HTTP and permission errors of several libraries
        for name in ("config.json", "adapter_config.json"):
            kept = try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(kept, str):
                return _folder(Path(kept).parent)
        known = [*assets.MODELS, *(f"models/{path.name}" for path in (ROOT / "models").glob("*"))]
        close = difflib.get_close_matches(repository, known, n=1)
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"cannot load {repository!r}: not a name that dctlib pins ({', '.join(assets.MODELS)}), not a local model "
            f"folder, and not reachable on the Hub ({reason}). "
            + (f"Did you mean {close[0]!r}?" if close else "Check the spelling and the network.")
        ) from error
