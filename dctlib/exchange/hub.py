"""A transcoder as a folder to share: numbers, the facts that make them usable, a model card, and checksums."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dctlib._io import atomic_path, sha256
from dctlib.fits.transcoder import Transcoder
from dctlib.maps.nonlinearity import Activation

_CONFIG, _NUMBERS, _SUMS, _CARD = "config.json", "transcoder.safetensors", "SHA256SUMS", "README.md"

_TEXT = """---
base_model: "{model}"
library_name: dctlib
tags: [steering-vectors, deep-causal-transcoding]
---

# {count} steering vectors for {model}

A deep causal transcoder ({activation}) of layers {layer} to {target_layer}. A row of `V` times {scale:g} is a steering
vector, added at every position to the input of block {layer} (`hidden_states[{layer}]`, counted from 0). The same row
of `U` is what that writes into `hidden_states[{target_layer}]`. `config.json` says so for programs.

```python
from dctlib import steer
from dctlib.exchange.hub import load_folder

dct = load_folder("this/folder").transcoder
with steer(model, layer=dct.source, vector=dct.steering_vectors()[0]):
    model.generate(**inputs)
```

Steering vectors change what a model says, and may undo its safety training. The prompts that these were fitted on are
not included, only their SHA-256. `sha256sum --check SHA256SUMS` tells whether the files are whole.
"""


class Facts(BaseModel):
    """Content of ``config.json``. Unknown keys are refused, because they could change what the vectors mean."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(pattern=r"^\w[\w./-]*$")]
    """A Hub id, or a local name that the reader knows."""
    revision: Annotated[str, Field(pattern=r"^\w[\w./-]*$")] | None
    """The model's commit on the Hub."""
    hook_point: Literal["resid_pre"]
    """Where vectors are added: the input of a block."""
    layer: Annotated[int, Field(ge=0)]
    """Of which block."""
    operation: Literal["add"]
    positions: Literal["all"]
    scale: Annotated[float, Field(gt=0)]
    """R, the length of a steering vector."""
    activation: Activation
    target_layer: Annotated[int, Field(ge=1)]
    """Where U was measured."""
    prompts_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """:func:`prompts_digest` of what it was fitted on."""
    dctlib_version: str


@dataclass(frozen=True, eq=False)
class SharedTranscoder:
    """A transcoder and the facts beside it, from :func:`load_folder`.

    Attributes
    ----------
    transcoder : Transcoder
        Bit for bit what was saved. Steer with its ``steering_vectors()`` at its ``source``.
    facts : Facts
        Which model it belongs to, and what to do with it there.
    """

    transcoder: Transcoder
    facts: Facts


def prompts_digest(texts: Sequence[str]) -> str:
    """Return the SHA-256 of prompts in their order, which tells whether two fits used the same prompts."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"got texts={texts!r}, expected at least one prompt in a list")
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def save_folder(folder: str | Path, dct: Transcoder, *, model: str, revision: str | None, texts: Sequence[str]) -> None:
    """Write a folder to share or to upload to a hub as it is, whole or not at all.

    Parameters
    ----------
    folder : path
        A folder that :func:`save_folder` wrote there before is replaced; any other is refused.
    dct : Transcoder
        A fit to a model. To share a few of its factors, give ``U``, ``V`` and ``alpha`` those rows by
        ``dataclasses.replace``.
    model : str
        The model that the reader has to load: a Hub id ``owner/name``, or a name that both know.
    revision : str or None
        Its commit on the Hub, where it has one.
    texts : sequence of str
        The prompts that it was fitted on. Only their hash is written.

    Raises
    ------
    ValueError
        If the transcoder was fitted to a plain function, a name has other characters than letters, digits and
        ``_ . / -``, or `folder` holds something else.
    """
    folder = Path(folder)
    check_replaceable(folder)
    if dct.source is None or dct.target is None:
        raise ValueError("this transcoder was fitted to a plain function, expected one fitted to layers of a model")
    content = {
        "model": model,
        "revision": revision,
        "hook_point": "resid_pre",
        "operation": "add",
        "positions": "all",
        **_repeated(dct),
        "prompts_sha256": prompts_digest(texts),
        "dctlib_version": version("dctlib"),
    }
    facts = _facts(json.dumps(content), "what to save")
    with atomic_path(folder) as partial:
        partial.mkdir()
        dct.save(partial / _NUMBERS)
        (partial / _CONFIG).write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (partial / _CARD).write_text(
            _TEXT.format(count=len(dct.steering_vectors()), **facts.model_dump()), encoding="utf-8"
        )
        (partial / _SUMS).write_text(_sums(partial), encoding="utf-8")


def check_replaceable(folder: str | Path) -> None:
    """Raise ValueError if `folder` holds anything but what :func:`save_folder` wrote, which it replaces."""
    folder = Path(folder)
    if folder.exists() and not _is_ours(folder):
        raise ValueError(f"{folder} exists and is no folder that save_folder wrote; choose another name")


def load_folder(folder: str | Path) -> SharedTranscoder:
    """Return the transcoder of a folder that :func:`save_folder` wrote, and the facts about it.

    Three files are opened, by their exact names. Nothing is executed, unpickled or fetched. The model card may be
    edited, the rest not.

    Raises
    ------
    ValueError
        If a file is missing or damaged, a fact is unknown or of another kind, or facts and numbers disagree.
    """
    folder = Path(folder)
    try:
        sums, named, config = _sums(folder), (folder / _SUMS).read_bytes(), (folder / _CONFIG).read_bytes()
    except OSError as error:
        raise ValueError(f"{folder} lacks a file ({error}), expected {_CONFIG}, {_NUMBERS} and {_SUMS}") from error
    if named != sums.encode():
        raise ValueError(f"{folder} is damaged: {_SUMS} does not fit {_CONFIG} and {_NUMBERS}; fetch it again")
    facts = _facts(config, str(folder / _CONFIG))
    dct = Transcoder.load(folder / _NUMBERS)
    for name, found in _repeated(dct).items():
        if getattr(facts, name) != found:
            raise ValueError(
                f"{folder}: got {name}={getattr(facts, name)!r}, but {_NUMBERS} says {found!r}; save it again"
            )
    return SharedTranscoder(dct, facts)


def model_reference(model: str) -> tuple[str, str | None]:
    """Return the name and the revision of a model for :func:`save_folder`, with no path of this machine.

    ``owner/name@revision`` is split. Of a path of this machine, the name is the folder's own.
    """
    if Path(model).is_absolute() or model.startswith("."):
        return re.sub(r"[^\w.-]", "-", Path(model).name).lstrip(".-"), None
    name, _, revision = model.partition("@")
    return name, revision or None


def _is_ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or {_CONFIG, _NUMBERS, _SUMS} <= names <= {_CONFIG, _NUMBERS, _SUMS, _CARD}


def _repeated(dct: Transcoder) -> dict[str, int | float | str | None]:
    """Return the facts that the transcoder holds too."""
    return {
        "layer": dct.source,
        "target_layer": dct.target,
        "scale": dct.input_scale,
        "activation": dct.activation,
    }


def _facts(content: str | bytes, where: str) -> Facts:
    try:
        return Facts.model_validate_json(content)
    except ValidationError as error:
        lines = [
            f"{where}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}, got {detail['input']!r:.80}"
            for detail in error.errors()
        ]
        raise ValueError("\n".join(lines)) from error


def _sums(folder: Path) -> str:
    """As ``sha256sum`` prints them."""
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in (_CONFIG, _NUMBERS))
