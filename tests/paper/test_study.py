import json
import signal

import pytest
import yaml
from filelock import FileLock

from dctlib._io import ROOT
from dctlib.paper import study
from dctlib.paper.study import STAGES, run_study, study_cells, verify_records
from dctlib.runs.cache import task
from dctlib.runs.records import read_record

CALLS = []


@task(version=1)
def square(seed, shift):
    CALLS.append(seed)
    if seed == 7:
        raise RuntimeError("no such seed")
    if seed == 8:
        signal.raise_signal(signal.SIGTERM)
    if seed == 9:
        raise KeyboardInterrupt
    return {"square": (seed + shift) ** 2 / 3}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A study of two stages in a repository of the test's own."""

    def declare(first, second=(), shift=0):
        CALLS.clear()
        profile = {"first": {"seeds": [*first], "shift": shift}, "second": {"seeds": [*second], "shift": 0}}
        monkeypatch.setattr(study, "load_profile", lambda name, root: profile)
        return tmp_path

    def cells(seeds, shift):
        return [(square, {"seed": seed, "shift": shift}) for seed in seeds]

    for name in list(STAGES):
        monkeypatch.delitem(STAGES, name)
    for name in ("first", "second"):
        monkeypatch.setitem(STAGES, name, cells)
    return declare


def recorded(root):
    return {
        (path.parent.name, json.loads(path.read_text())["setting"]["seed"]) for path in root.glob("records/study/*/*")
    }


def test_the_queue_records_every_cell_in_order_and_then_has_nothing_to_do(toy, capsys):
    root = toy([2, 0, 2], [1])
    run_study(root=root)
    assert CALLS == [2, 0, 1]
    assert recorded(root) == {("first", 2), ("first", 0), ("second", 1)}
    assert (
        "3 of 3 cells are recorded, 0 remain.\nCommit the new records: git add records/study" in capsys.readouterr().out
    )
    run_study(root=root)
    assert CALLS == [2, 0, 1]


def test_a_cell_that_another_process_computes_is_left_to_it(toy, capsys):
    root = toy([0, 1])
    claimed, _ = study_cells(root=root)
    with FileLock(root / ".cache" / "study" / f"{claimed.path.stem}.lock"):
        run_study(root=root)
    assert CALLS == [1]
    assert "1 of 2 cells are recorded, 1 remain." in capsys.readouterr().out
    run_study(root=root)  # a lock that its process has left claims nothing
    assert CALLS == [1, 0]


def test_one_stage_is_worked_on_alone(toy, capsys):
    root = toy([0], [1])
    run_study(stage="second", root=root)
    assert recorded(root) == {("second", 1)}
    with pytest.raises(ValueError, match="got the stage 'third', expected one of first, second"):
        run_study(stage="third", root=root)


def test_no_cell_is_started_after_its_minutes(toy, capsys):
    root = toy([0, 1])
    run_study(minutes=0, root=root)
    assert CALLS == []
    assert "0 of 2 cells are recorded, 2 remain." in capsys.readouterr().out


@pytest.mark.parametrize("stops", [8, 9])
def test_a_stop_keeps_what_is_finished_and_says_so_in_one_line(toy, capsys, stops):
    before = signal.getsignal(signal.SIGTERM)
    root = toy([0, stops, 1])
    run_study(root=root)
    assert recorded(root) == {("first", 0)}
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "stopped: the cell that was running is computed again next time"
    assert "1 of 3 cells are recorded, 2 remain." in printed.out
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_cell_that_fails_is_named_and_the_others_are_recorded(toy, capsys):
    root = toy([0, 7, 1])
    with pytest.raises(
        ValueError, match=r"1 cells failed, the last one with first: square\(.*7.*RuntimeError: no such"
    ):
        run_study(root=root)
    assert recorded(root) == {("first", 0), ("first", 1)}


def test_the_third_failure_ends_the_queue(toy, monkeypatch, capsys):
    root = toy([0, 1, 2, 3])
    monkeypatch.setattr(study, "record_cell", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match=r"3 cells failed, .*ZeroDivisionError"):
        run_study(root=root)


def test_a_cell_that_came_from_elsewhere_meanwhile_is_not_computed(toy, monkeypatch, capsys):
    root = toy([0, 1])
    record = study.record_cell

    def record_both(task, setting, folder):
        record(task, {**setting, "seed": 1}, folder=folder)
        return record(task, setting, folder=folder)

    monkeypatch.setattr(study, "record_cell", record_both)
    run_study(root=root)
    assert CALLS == [1, 0]


def test_verifying_computes_a_sample_again_and_names_what_an_edit_changed(toy, monkeypatch, capsys):
    root = toy([1, 2, 3, 4])
    run_study(root=root)
    CALLS.clear()
    verify_records(sample=2, seed=0, root=root)
    assert len(set(CALLS)) == 2
    assert "computed 2 of 4 recorded cells again (seed 0): 0 differ" in capsys.readouterr().out
    verify_records(sample=9, seed=0, root=root)

    (cell,) = [cell for cell in study_cells(root=root) if cell.setting["seed"] == 3]
    path = cell.path
    record = read_record(path)
    record["result"]["square"] = 5.0
    path.write_text(json.dumps(record | {"checksum": study_checksum(record)}))
    with pytest.raises(
        ValueError, match=rf"^first: square {path.stem}: .*recorded 5.0, computed 3.0.* version raised\?$"
    ):
        verify_records(sample=4, seed=0, root=root)


def study_checksum(record):
    from dctlib.runs.records import _checksum

    return _checksum(record)


def test_every_stage_is_drawn_from_its_records_alone():
    drawn = yaml.safe_load((ROOT / "study" / "dvc.yaml").read_text())["stages"]
    for name, stage in drawn.items():
        assert {f"notebooks/{name}.ipynb", f"records/study/{name}"} <= set(stage["deps"])
        assert not any(dep.startswith(("models/", "data/", "vectors/")) for dep in stage["deps"])
        assert stage["cmd"] == f"python -m dctlib run {name} --profile study"
        assert stage["params"] == [{"params/study.yaml": [name]}]
    assert set(STAGES) <= set(drawn)
