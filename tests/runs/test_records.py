import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dctlib.runs.cache import task
from dctlib.runs.records import mismatches, missing_cells, read_record, record_cell, record_cells, record_path

CALLS = []


@task(version=1)
def refusal(seed):
    CALLS.append(seed)
    return {"rate": seed / 3, "texts": ["I cannot", "é"], "count": 2}


@task(version=1)
def wide_fit(seed):
    V = torch.full((2, 3), seed / 3, dtype=torch.float16)
    return {"V": V.T, "first": V[:1], "seed": seed}


@task(version=1)
def by_number(seed):
    return {2: "two", 10: "ten"}


@task(version=1)
def nan(seed):
    return {"rate": float("nan")}


@task(version=1)
def dies_at_second(seed):
    if seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return seed


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


SETTINGS = [{"seed": 0}, {"seed": 1}]


def test_each_cell_is_computed_once_and_read_afterwards(tmp_path):
    first = record_cells(refusal, [*SETTINGS, SETTINGS[0]], folder=tmp_path, progress=False)
    again = record_cells(refusal, SETTINGS, folder=tmp_path, compute=False)
    assert first == [*again, again[0]]
    assert again == [refusal(0), refusal(1)]
    assert CALLS == [0, 1, 0, 1]


def test_a_record_with_numbers_for_keys_is_read_as_it_was_written(tmp_path):
    assert record_cells(by_number, SETTINGS[:1], folder=tmp_path, progress=False) == [{"2": "two", "10": "ten"}]


def test_a_record_says_what_it_is_and_what_made_it_and_no_path_of_this_machine(tmp_path):
    path = record_cell(refusal, {"seed": 1}, folder=tmp_path)
    assert path == record_path(refusal, {"seed": 1}, folder=tmp_path)
    record = json.loads(path.read_text())
    assert (record["task"], record["version"], record["setting"]) == ("refusal", 1, {"seed": 1})
    assert record["result"]["rate"] == 1 / 3
    assert set(record["made"]) == {"dctlib", "torch", "transformers", "processor", "threads", "date", "seconds"}
    assert str(tmp_path) not in path.read_text() and str(Path.home()) not in path.read_text()


def test_missing_cells_are_counted_where_nothing_may_be_computed(tmp_path):
    record_cell(refusal, SETTINGS[0], folder=tmp_path / "curves")
    assert missing_cells(refusal, [*SETTINGS, SETTINGS[1]], folder=tmp_path / "curves") == [SETTINGS[1]]
    with pytest.raises(ValueError, match=r"1 of 2 cells of refusal have no record in curves: .*make study"):
        record_cells(refusal, SETTINGS, folder=tmp_path / "curves", compute=False)
    assert CALLS == [0]


def test_another_version_is_another_record(tmp_path, monkeypatch):
    record_cell(refusal, SETTINGS[0], folder=tmp_path)
    monkeypatch.setattr(refusal, "version", 2)
    assert missing_cells(refusal, SETTINGS, folder=tmp_path) == SETTINGS


def test_tensors_lie_beside_their_record(tmp_path):
    (found,) = record_cells(wide_fit, SETTINGS[1:], folder=tmp_path, progress=False)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert torch.equal(found["V"], torch.full((3, 2), 1 / 3, dtype=torch.float16))
    assert found["first"].dtype == torch.float16 and found["seed"] == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("0.333", "0.444"),
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: f"<<<<<<< HEAD\n{text}",
    ],
)
def test_a_damaged_or_edited_record_is_named(tmp_path, damage):
    path = record_cell(refusal, SETTINGS[1], folder=tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=rf"{path.name} is damaged or was edited"):
        record_cells(refusal, SETTINGS[1:], folder=tmp_path)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_damaged_tensors_are_named(tmp_path, damage):
    path = record_cell(wide_fit, SETTINGS[1], folder=tmp_path)
    damage(path.with_suffix(".safetensors"))
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        read_record(path)


def test_another_layout_of_the_same_content_is_no_damage(tmp_path):
    path = record_cell(refusal, SETTINGS[1], folder=tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True).replace("\n", "\r\n"))
    assert read_record(path)["result"]["rate"] == 1 / 3


def test_a_result_that_is_no_json_leaves_no_record(tmp_path):
    with pytest.raises(ValueError, match=r"expected JSON without NaN.*of nan"):
        record_cell(nan, SETTINGS[0], folder=tmp_path)
    with pytest.raises(ValueError, match="expected arguments of refusal"):
        record_cells(refusal, [*SETTINGS, {"sed": 1}], folder=tmp_path)
    assert not list(tmp_path.iterdir()) and not CALLS


def test_a_kill_loses_only_the_running_cell(tmp_path):
    code = (
        "import sys; from runs.test_records import *\n"
        "record_cells(dies_at_second, [{'seed': seed} for seed in range(3)], folder=sys.argv[1], progress=False)"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL
    assert record_cells(dies_at_second, SETTINGS[:1], folder=tmp_path, compute=False) == [0]
    assert len(missing_cells(dies_at_second, [{"seed": seed} for seed in range(3)], folder=tmp_path)) == 2


RESULT = {"rate": 0.5, "scores": [1.0, -2.0, 0.001], "count": 3, "texts": ["a", "b"], "V": torch.ones(4)}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"rate": 0.5001}, None),
        ({"rate": 0.51}, "result.rate"),
        ({"scores": [1.0, -2.0, 0.002]}, None),  # near 0 beside its size
        ({"scores": [1.0, -2.0, 0.1]}, "result.scores"),
        ({"scores": [1.0, -2.0]}, "result.scores"),
        ({"count": 4}, "result.count"),
        ({"count": 3.0}, "result.count"),
        ({"texts": ["a", "c"]}, r"result.texts\[1\]: recorded 'b', computed 'c'"),
        ({"texts": ["a"]}, r"result.texts\[1\]"),
        ({"more": None}, "result.more"),
        ({"V": torch.full((4,), 1.0005)}, None),
        ({"V": torch.full((4,), 1.1)}, "result.V"),
    ],
)
def test_a_second_computation_agrees_within_the_tolerance_or_the_value_is_named(change, place):
    found = mismatches(refusal, RESULT, RESULT | change)
    assert len(found) == (place is not None)
    assert place is None or re.match(place, found[0])


def test_a_task_of_generated_texts_declares_how_many_values_must_agree(monkeypatch):
    monkeypatch.setattr(refusal, "agreement", 0.75)
    texts = ["a", "b", "c", "d"]
    assert mismatches(refusal, texts, [*texts[:3], "x"]) == []
    assert len(mismatches(refusal, texts, [*texts[:2], "x", "y"])) == 2


def test_tuples_and_number_keys_agree_with_what_a_record_holds_of_them(tmp_path):
    assert mismatches(refusal, {"1": [1, 2]}, {1: (1, 2)}) == []
