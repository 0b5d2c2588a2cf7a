import json
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest

from dctlib import store
from dctlib.store import key_of, remember, sha256, whole, write_json


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with whole(path) as partial:
        partial.write_text("first")
    with pytest.raises(RuntimeError), whole(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first"
    assert [child.name for child in path.parent.iterdir()] == ["file.txt"]


def test_folders_are_replaced_whole(tmp_path):
    for content in ("old", "new"):
        with whole(tmp_path / "model") as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    assert [child.name for child in (tmp_path / "model").iterdir()] == ["new"]


def test_a_replaced_folder_is_moved_away_whole(tmp_path, monkeypatch):
    """Removing it in place would leave, after a kill, a part of it under its name."""
    seen = []

    def removed(*_args, **_kwargs):
        seen.append([child.name for child in (tmp_path / "model").iterdir()])

    for content in ("old", "new"):
        with whole(tmp_path / "model") as partial:
            partial.mkdir()
            (partial / content).write_text(content)
            monkeypatch.setattr("tempfile.TemporaryDirectory.cleanup", removed)
    assert seen == [["old"], ["new"]]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_kill_half_way_leaves_what_was_there(tmp_path, before):
    code = (
        "import sys, time; from pathlib import Path; from dctlib.store import whole\n"
        "with whole(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); print('writing', flush=True); time.sleep(60)"
    )
    path = tmp_path / "result.json"
    if before:
        path.write_text(before)
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
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


def test_remember_makes_once_and_again_for_other_inputs(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"value": len(calls)}

    assert remember(tmp_path, {"seed": 0}, [], make) == {"value": 1}
    assert remember(tmp_path, {"seed": 0}, [], make) == {"value": 1}
    assert remember(tmp_path, {"seed": 1}, ["fit"], make) == {"value": 2}


def test_keys_depend_on_inputs_not_on_their_order():
    one = key_of({"a": 1, "b": [2]}, ["fit"])
    assert one == key_of({"b": [2], "a": 1}, ["fit"])
    assert len({one, key_of({"a": 1, "b": [3]}, ["fit"]), key_of({"a": 1, "b": [2]}, ["rank"])}) == 3


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_keys_depend_on_what_computes(package, monkeypatch):
    before = key_of({"a": 1}, [])
    monkeypatch.setattr(store, "version", lambda name: "0" if name == package else version(name))
    assert key_of({"a": 1}, []) != before


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
