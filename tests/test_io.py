import json
import signal
import subprocess
import sys

import pytest

from dctlib._io import ROOT, atomic_path, find_path, find_root, sha256, write_json
from dctlib.runs.cache import cache_key, remember


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_path(path) as partial:
        partial.write_text("first")
    with pytest.raises(RuntimeError), atomic_path(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first"
    assert [child.name for child in path.parent.iterdir()] == ["file.txt"]


def test_folders_are_replaced_whole(tmp_path):
    for content in ("old", "new"):
        with atomic_path(tmp_path / "model") as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    assert [child.name for child in (tmp_path / "model").iterdir()] == ["new"]


def test_a_folder_that_nothing_replaces_stays(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "model"):
        pass
    assert [child.name for child in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_a_replaced_folder_is_moved_away_whole(tmp_path, monkeypatch):
    """Removing it in place would leave, after a kill, a part of it under its name."""
    seen = []

    def removed(*_args, **_kwargs):
        seen.append([child.name for child in (tmp_path / "model").iterdir()])

    for content in ("old", "new"):
        with atomic_path(tmp_path / "model") as partial:
            partial.mkdir()
            (partial / content).write_text(content)
            monkeypatch.setattr("tempfile.TemporaryDirectory.cleanup", removed)
    assert seen == [["old"], ["new"]]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_kill_half_way_leaves_what_was_there(tmp_path, before):
    code = (
        "import sys, time; from pathlib import Path; from dctlib._io import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); print('writing', flush=True); time.sleep(60)"
    )
    path = tmp_path / "result.json"
    if before:
        path.write_text(before)
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert path.exists() == bool(before)
    if before:
        assert path.read_text() == before


def test_json_is_readable_by_others(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1.5, "é"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1.5, "é"]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "b.json", {"x": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_remember_makes_once_and_again_for_another_key(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"value": len(calls)}

    keys = [cache_key("task", 1, {"seed": 0}), cache_key("task", 1, {"seed": 0}), cache_key("task", 1, {"seed": 1})]
    assert [remember(tmp_path, key, make) for key in keys] == [{"value": 1}, {"value": 1}, {"value": 2}]


def test_keys_depend_on_inputs_not_on_their_order():
    one = cache_key("task", 1, {"a": 1, "b": [2]})
    assert one == cache_key("task", 1, {"b": [2], "a": 1})
    others = [("task", 1, {"a": 1, "b": [3]}), ("task", 2, {"a": 1, "b": [2]}), ("other", 1, {"a": 1, "b": [2]})]
    assert one not in [cache_key(*of) for of in others]


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_data_and_models_lie_in_a_clone_or_else_in_a_cache_folder(tmp_path, monkeypatch):
    package = tmp_path / "clone" / "dctlib"
    (tmp_path / "clone" / "params").mkdir(parents=True)
    monkeypatch.setenv("DCTLIB_HOME", str(tmp_path / "elsewhere"))
    assert find_root(package) == tmp_path / "clone"
    installed = tmp_path / "site-packages" / "dctlib"
    assert find_root(installed) == tmp_path / "elsewhere"
    monkeypatch.delenv("DCTLIB_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert find_root(installed) == tmp_path / "home" / ".cache" / "dctlib"


@pytest.mark.parametrize("name", ["params", "params/run.yaml", ROOT / "params"])
def test_a_path_is_looked_up_here_and_then_in_the_clone(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_path(name) == ROOT / name
    if name == "params":
        (tmp_path / name).mkdir()
        assert (found := find_path(name)) and found.samefile(tmp_path / name)


@pytest.mark.parametrize("name", ["nowhere", "~nobody-here/x", "~0", "x" * 300, "a\0b", "\ud800"])
def test_a_path_that_cannot_be_is_none(name):
    assert find_path(name) is None


def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "kept").write_text("x")
    with pytest.raises(ValueError, match="results is a folder, expected the name of a file"):
        write_json(tmp_path / "results", {})
    assert (tmp_path / "results" / "kept").read_text() == "x"
