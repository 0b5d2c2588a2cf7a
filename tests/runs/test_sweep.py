import json
import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest
import torch

from dctlib import Transcoder, fit_exponential
from dctlib.maps.synthetic import synthetic_map
from dctlib.runs import sweep as sweep_module
from dctlib.runs.cache import task
from dctlib.runs.sweep import _run_on_node, run_sweep


def mark(calls, name):
    """Leave a file for this call; whether it is the first of its name."""
    before = list(Path(calls).glob(f"{name}-*"))
    (Path(calls) / f"{name}-{os.getpid()}-{time.monotonic_ns()}").touch()
    return not before


@task(version=1)
def fit(calls, num_factors, seed):
    mark(calls, f"{num_factors}.{seed}")
    cmap = synthetic_map(3, 12, seed=seed, dtype=torch.float64).cmap
    return fit_exponential(cmap, num_factors=num_factors, input_scale=2.0, iterations=3, seed=seed, progress=False)


@task(version=1)
def number(calls, seed):
    mark(calls, seed)
    return {"seed": seed, "values": [seed / 3, "é"]}


@task(version=1)
def vectors(calls, seed):
    mark(calls, seed)
    V = torch.full((2, 3), seed / 3)
    return {"seed": seed, "V": V.T, "first": V[:1], "names": ["é"]}  # which share their memory


@task(version=1)
def nan_beside_a_tensor(calls, seed):
    return {"V": torch.zeros(1), "loss": float("nan")}


@task(version=1)
def dies_at_first(calls, seed):
    """Kill the worker: seed 1 once, seed −1 always."""
    first = mark(calls, str(seed).replace("-", "_"))
    if (seed == 1 and first) or seed == -1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"third": seed / 3, "threads": torch.get_num_threads()}


@task(version=1)
def waits(calls, seed):
    """Give 2 and 3 only once there is a file `go`."""
    mark(calls, seed)
    while seed > 1 and not (Path(calls) / "go").exists():
        time.sleep(0.05)
    return seed / 3


@task(version=1)
def fails(seed):
    if seed == 1:
        raise KeyError("no such seed")
    return float("nan") if seed == 2 else seed


@pytest.fixture
def sweep(tmp_path):
    """run_sweep with folders of the test's own."""
    calls, folder = tmp_path / "calls", tmp_path / "results"
    calls.mkdir()

    def over(task, settings, **options):
        options = {"folder": folder, "ray": "", "progress": False, **options}
        return run_sweep(task, [{"calls": str(calls), **setting} for setting in settings], **options)

    over.calls, over.folder = calls, folder  # pyright: ignore[reportFunctionMemberAccess]
    return over


SEEDS = [{"seed": seed} for seed in range(4)]


def workers(calls):
    """The processes that left a mark."""
    return {int(path.name.split("-")[1]) for path in Path(calls).glob("*-*")}


def calls_of(sweep):
    return sorted(path.name.split("-")[0] for path in sweep.calls.iterdir())


def test_results_are_in_order_and_each_is_computed_once(sweep):
    settings = [{"num_factors": m, "seed": seed} for m in (4, 2) for seed in (1, 0)]
    first = sweep(fit, [*settings, settings[0]])
    again = sweep(fit, settings[::-1])
    assert calls_of(sweep) == ["2.0", "2.1", "4.0", "4.1"]
    assert len(list(sweep.folder.glob("*.safetensors"))) == 4
    for setting, dct, same in zip(settings, first, again[::-1], strict=False):
        alone = fit(sweep.calls, **setting)
        assert isinstance(dct, Transcoder)
        assert torch.equal(dct.V, alone.V) and torch.equal(dct.alpha, alone.alpha) and torch.equal(same.V, alone.V)
    assert torch.equal(first[-1].V, first[0].V)


def test_tensors_beside_json_come_back_as_they_were(sweep):
    for _ in range(2):
        (found,) = sweep(vectors, SEEDS[1:2])
        assert torch.equal(found.pop("V"), torch.full((3, 2), 1 / 3))
        assert torch.equal(found.pop("first"), torch.full((1, 3), 1 / 3))
        assert found == {"seed": 1, "names": ["é"]}
    assert calls_of(sweep) == ["1"]
    with pytest.raises(ValueError, match="expected JSON without NaN"):
        sweep(nan_beside_a_tensor, SEEDS[:1])


def test_the_setting_and_the_task_are_what_a_result_depends_on(sweep):
    sweep(number, SEEDS[:1])
    sweep(number, SEEDS[:2])
    sweep(waits, SEEDS[:2])
    assert calls_of(sweep) == ["0"] * 2 + ["1"] * 2


def test_a_worker_that_is_killed_is_started_again_and_changes_no_result(sweep):
    parallel = sweep(dies_at_first, SEEDS, workers=2, threads=1)
    assert parallel == [{"third": seed / 3, "threads": 1} for seed in range(4)]
    assert calls_of(sweep) == ["0", "1", "1", "2", "3"]


class Dying:
    """In place of a worker: it is dead before it takes a task of seed −1."""

    def submit(self, run, task, threads, setting):
        if setting["seed"] == -1:
            raise BrokenProcessPool
        done = Future()
        done.set_result(run(task, threads, setting))
        return done

    def shutdown(self):
        pass


def test_a_task_that_kills_every_worker_is_named_and_the_others_are_kept(sweep, monkeypatch):
    started = []
    monkeypatch.setattr("dctlib.runs.sweep._start_process", lambda: started.append(1) or Dying())
    with pytest.raises(RuntimeError, match=r"process of number\(calls=.*, seed=-1\) died 3 times"):
        sweep(number, [SEEDS[0], {"seed": -1}], workers=2)
    assert len(started) == 2 + 3
    assert sweep(number, SEEDS[:1]) == [{"seed": 0, "values": [0.0, "é"]}]
    assert calls_of(sweep) == ["0"]


def test_a_node_with_other_code_than_the_driver_computes_nothing(tmp_path):
    setting = {"calls": str(tmp_path), "seed": 0}
    with pytest.raises(ValueError, match=r"has another .*test_sweep, or another dctlib behind it"):
        _run_on_node(Path.cwd(), "a digest of other code", number, 1, setting)
    assert not list(tmp_path.iterdir())


def test_the_code_of_a_node_is_the_library_that_it_imports(monkeypatch, tmp_path):
    """Also where it is installed, and no clone is near."""
    before = sweep_module._digest_code(number)
    changed = tmp_path / "dctlib" / "runs" / "sweep.py"
    changed.parent.mkdir(parents=True)
    changed.write_text("another library")
    monkeypatch.setattr(sweep_module, "__file__", str(changed))
    assert sweep_module._digest_code(number) != before


def test_a_killed_driver_takes_its_workers_with_it_and_goes_on_where_it_was(sweep):
    code = (
        "import sys; from runs.test_sweep import waits; from dctlib.runs.sweep import run_sweep\n"
        "settings = [{'calls': sys.argv[1], 'seed': seed} for seed in range(4)]\n"
        "run_sweep(waits, settings, folder=sys.argv[2], workers=2, ray='', progress=False)"
    )
    command = [sys.executable, "-c", code, sweep.calls, sweep.folder]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) as driver:
        try:
            until(lambda: calls_of(sweep) == ["0", "1", "2", "3"] and len(list(sweep.folder.glob("*.json"))) == 2)
        finally:
            driver.kill()  # else leaving the context waits for it for ever
    until(lambda: not any(runs(worker) for worker in workers(sweep.calls)))
    (sweep.calls / "go").touch()
    assert sweep(waits, SEEDS) == [0, 1 / 3, 2 / 3, 1]
    assert calls_of(sweep) == ["0", "1", "2", "2", "3", "3", "go"]


def until(condition, seconds=300):  # processes start slowly on a busy machine
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content.replace(b"0.3", b"0.4")])
def test_a_damaged_result_is_computed_again(sweep, damage):
    whole = sweep(number, SEEDS)
    (path,) = (path for path in sweep.folder.iterdir() if json.loads(path.read_text())["seed"] == 1)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged"):
        assert sweep(number, SEEDS) == whole
    with warnings.catch_warnings(action="error"):
        assert sweep(number, SEEDS) == whole
    assert calls_of(sweep) == ["0", "1", "1", "2", "3"]
    assert len(list(sweep.folder.iterdir())) == 4


def test_what_a_task_raises_names_its_setting_and_other_results_are_kept(tmp_path):
    options = {"folder": tmp_path / "results", "ray": "", "progress": False}
    with pytest.raises(KeyError, match="no such seed") as raised:
        run_sweep(fails, SEEDS[:2], **options)
    assert raised.value.__notes__ == ["in fails(seed=1)"]
    with pytest.raises(ValueError, match="JSON without NaN"):
        run_sweep(fails, [{"seed": 2}], **options)
    assert [path.read_text() for path in (tmp_path / "results").iterdir()] == ["0"]


@pytest.mark.parametrize(
    ("task", "setting", "options", "message"),
    [
        (lambda seed: seed, {"seed": 1}, {}, "a function of a module"),
        (fails, {"seed": torch.ones(1)}, {}, "as JSON"),
        (fails, {"seed": float("nan")}, {}, "as JSON"),
        (fails, {"sed": 1}, {}, r"'sed'.*expected arguments of fails"),
        (fails, {"seed": 0}, {"workers": 0}, "workers=0"),
        (fails, {"seed": 0}, {"threads": 0}, "threads=0"),
    ],
)
def test_bad_arguments_are_named_before_any_work(tmp_path, task, setting, options, message):
    with pytest.raises(ValueError, match=message):
        run_sweep(task, [{"seed": 0}, setting], folder=tmp_path, ray="", progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_ray_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    options = {"folder": tmp_path, "progress": False}
    with pytest.raises(ImportError, match=r"pip install 'dctlib\[ray\]'"):
        run_sweep(fails, [{"seed": 0}], **options)
    assert run_sweep(fails, [{"seed": 0}], ray="", **options) == [0]
