"""Steering vectors as a folder to share: numbers, the facts that make them usable, a model card, and checksums."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dctlib._io import atomic_path, sha256
from dctlib.models.assets import MODELS

_CONFIG, _NUMBERS, _SUMS, _CARD = "config.json", "vectors.safetensors", "SHA256SUMS", "README.md"
_TENSOR = "vectors"

_TEXT = """---
base_model: "{model}"
library_name: dctlib
tags: [steering-vectors, deep-causal-transcoding]
---

# {count} steering vectors for {model}

The rows of `{tensor}` in `{numbers}`, best first. Each is added at every position to the input of block {layer}
(`hidden_states[{layer}]`, counted from 0), at its own length. `config.json` says so for programs, with what was
measured.

```python
from dctlib import load_model, steer
from dctlib.exchange.hub import load_folder

model, tokenizer = load_model("{reference}")
shared = load_folder("this/folder")
with steer(model, layer=shared.facts.layer, vector=shared.vectors[0]):
    model.generate(**inputs)
```

{table}

Steering vectors change what a model says, and may undo its safety training. The prompts that these were found on are
not included, only their SHA-256. `sha256sum --check SHA256SUMS` tells whether the files are whole.
"""


class VectorFacts(BaseModel):
    """What is known of one vector, from a row of the table of :class:`dctlib.discovery.found.FoundVectors`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    source: str
    """The method that found it."""
    length: Annotated[float, Field(gt=0)]
    damage: float | None = None
    score: float | None = None
    held_out: float | None = None
    says: str = ""
    """The beginning of a completion under it."""


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
    """The number of that block."""
    architecture: Annotated[str, Field(min_length=1)]
    """``model.config.model_type``."""
    operation: Literal["add"]
    positions: Literal["all"]
    vectors: list[VectorFacts]
    """One for each vector, in order."""
    prompts_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """:func:`prompts_digest` of what they were found on."""
    dctlib_version: str

    @property
    def reference(self) -> str:
        """What :func:`dctlib.load_model` takes."""
        return f"{self.model}@{self.revision}" if self.revision else self.model


@dataclass(frozen=True, eq=False)
class SharedVectors:
    """Steering vectors and the facts beside them, from :func:`load_folder`.

    Attributes
    ----------
    vectors : Tensor, (k, d)
        Bit for bit what was saved, each at its length. Steer with them at ``facts.layer``.
    facts : Facts
        Which model they belong to, and what to do with them there.
    """

    vectors: Float[Tensor, "k d"]
    facts: Facts


def prompts_digest(texts: Sequence[str]) -> str:
    """Return the SHA-256 of prompts in their order, which tells whether two fits used the same prompts."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"got texts={texts!r}, expected at least one prompt in a list")
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def save_folder(
    folder: str | Path,
    vectors: Float[Tensor, "k d"],
    rows: Sequence[Mapping[str, Any]],
    *,
    layer: int,
    model: str,
    revision: str | None,
    architecture: str,
    texts: Sequence[str],
) -> None:
    """Write a folder to share or to upload to a hub as it is, whole or not at all.

    Parameters
    ----------
    folder : path
        A folder that :func:`save_folder` wrote there before is replaced; any other is refused.
    vectors : Tensor, (k, d)
        Each at its length, best first: ``found.vectors`` of a search. There may be none.
    rows : sequence of mappings
        The fields of :class:`VectorFacts` for each: ``found.table.to_dict("records")``. Other keys are left out, and so
        are lengths, which are measured.
    layer : int
        Where they are added.
    model : str
        The model that the reader has to load: a Hub id ``owner/name``, or a name that both know.
    revision : str or None
        Its commit on the Hub, where it has one.
    architecture : str
        ``model.config.model_type``, which other tools want to know.
    texts : sequence of str
        The prompts that they were found on. Only their hash is written.

    Raises
    ------
    ValueError
        If a vector is zero or not finite, there is not one row for each, a name has other characters
        than letters, digits and ``_ . / -``, or `folder` holds something else.
    """
    vectors = vectors.detach().cpu().contiguous()
    if vectors.ndim != 2 or len(vectors) != len(rows):
        raise ValueError(f"got vectors {tuple(vectors.shape)} and {len(rows)} rows, expected (k, d) and k rows")
    content = {
        "model": model,
        "revision": revision,
        "hook_point": "resid_pre",
        "layer": layer,
        "architecture": architecture,
        "operation": "add",
        "positions": "all",
        "vectors": [
            {name: _or_none(row[name]) for name in VectorFacts.model_fields if name in row} | {"length": length}
            for row, length in zip(rows, _lengths(vectors), strict=True)
        ],
        "prompts_sha256": prompts_digest(texts),
        "dctlib_version": version("dctlib"),
    }
    write_shared(folder, SharedVectors(vectors, _facts(json.dumps(content), "what to save")))


def write_shared(folder: str | Path, shared: SharedVectors) -> None:
    """Write a folder that :func:`load_folder` reads, whole or not at all. It replaces only one of its own kind."""
    check_replaceable(folder)
    facts = shared.facts
    card = _TEXT.format(
        count=len(facts.vectors),
        tensor=_TENSOR,
        numbers=_NUMBERS,
        reference=facts.reference,
        table=_table(facts),
        **facts.model_dump(include={"model", "layer"}),
    )
    with atomic_path(folder) as partial:
        partial.mkdir()
        save_file({_TENSOR: shared.vectors}, partial / _NUMBERS)
        (partial / _CONFIG).write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (partial / _CARD).write_text(card, encoding="utf-8")
        (partial / _SUMS).write_text(_sums(partial), encoding="utf-8")


def check_replaceable(folder: str | Path) -> None:
    """Raise ValueError if `folder` holds anything but what :func:`save_folder` wrote, which it replaces."""
    folder = Path(folder)
    if folder.exists() and not _is_ours(folder):
        raise ValueError(f"{folder} exists and is no folder that save_folder wrote; choose another name")


def load_folder(folder: str | Path) -> SharedVectors:
    """Return the vectors of a folder that :func:`save_folder` wrote, and the facts about them.

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
    try:
        with safe_open(folder / _NUMBERS, framework="pt") as file:
            vectors = file.get_tensor(_TENSOR)
    except SafetensorError as error:
        raise ValueError(f"{folder / _NUMBERS} holds no tensor {_TENSOR!r} ({error}); save it again") from error
    stated = [each.length for each in facts.vectors]
    if vectors.ndim != 2 or not vectors.is_floating_point() or _lengths(vectors) != stated:
        raise ValueError(
            f"{folder}: got vectors {tuple(vectors.shape)} of {vectors.dtype}, but {_CONFIG} says {len(stated)} "
            f"vectors of the lengths {stated[:3]} …; save it again"
        )
    return SharedVectors(vectors, facts)


def model_reference(model: str) -> tuple[str, str | None]:
    """Return the name and the revision of a model for :func:`save_folder`, without a local path.

    ``owner/name@revision`` is split. The name of a local path is that of its folder, marked if a pinned model has it.
    """
    if model.startswith((".", "~")) or Path(model).is_absolute():
        folder = re.sub(r"[^\w.-]", "-", Path(model).name).lstrip(".-")
        return f"{folder}-local" if folder in MODELS else folder, None
    name, _, revision = model.partition("@")
    return name, revision or None


def _is_ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or {_CONFIG, _NUMBERS, _SUMS} <= names <= {_CONFIG, _NUMBERS, _SUMS, _CARD}


def _lengths(vectors: Float[Tensor, "k d"]) -> list[float]:
    return [float(f"{length:.6g}") for length in vectors.double().norm(dim=1).tolist()]


def _or_none(value: Any) -> Any:
    """Return a value as JSON holds it: None for NaN, which stands for what was not measured."""
    return None if isinstance(value, float) and value != value else value


def _table(facts: Facts) -> str:
    """Return what was measured as a table in Markdown."""
    names = [name for name in VectorFacts.model_fields if name != "says"]
    rows = [["vector", *names], *[["---"] * (len(names) + 1)]]
    for number, each in enumerate(facts.vectors):
        values = [getattr(each, name) for name in names]
        rows.append(
            [str(number), *(f"{value:.3g}" if isinstance(value, float) else str(value or "") for value in values)]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
    """Return the checksums as ``sha256sum`` prints them."""
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in (_CONFIG, _NUMBERS))
