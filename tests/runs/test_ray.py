"""A real cluster: two `ray start` on this machine, a CPU each. Slow, and skipped where Ray is not installed."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from runs.test_sweep import SEEDS, calls_of, dies_at_first, fails, fit, mark, runs, until, waits, workers
from tiny import assert_near, tiny_model, tiny_tokenizer, unit_rows

from dctlib import CausalMap, fit_exponential, fit_linear, fit_quadratic, load_model
from dctlib.runs.cache import cached_fit, task
from dctlib.runs.cluster import connect
from dctlib.runs.sharded_map import ShardedMap
from dctlib.runs.sweep import run_sweep

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

D, NEAR = 32, 1e-6  # transformers rounds softmax and RMSNorm to float32, by the number of rows at a time too
WHERE: dict[str, Any] = {"source": 1, "target": 3}


class Nodes:
    """Processes of `ray start`, one a node: they end with what they started, however they end."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address, self._running = f"127.0.0.1:{port}", list[subprocess.Popen]()
        self.add("--head", f"--port={port}", "--include-dashboard=false")

    def add(self, *options):
        options = options or (f"--address={self.address}",)
        small = ["--num-cpus=1", f"--object-store-memory={100 * 2**20}", "--node-ip-address=127.0.0.1", "--block"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *small]
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
        started = subprocess.Popen(command, **quiet)
        self._running.append(started)
        if len(self._running) == 1:
            until(self._answers)
        else:
            connect(self.address)
            until(lambda: sum(node["Alive"] for node in ray.nodes()) == len(self._running))
        return started

    def lose(self, node):
        """As if its machine had failed."""
        self._running.remove(node)
        self._kill(node)
        until(lambda: sum(each["Alive"] for each in ray.nodes()) == len(self._running))

    def second(self):
        return self._running[1]

    def end(self):
        for node in reversed(self._running):
            self._kill(node)

    def _kill(self, node):
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def _answers(self):
        host, port = self.address.split(":")
        with socket.socket() as trying:
            return trying.connect_ex((host, int(port))) == 0


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        nodes = Nodes()
        try:
            nodes.add()
            patch.setenv("RAY_ADDRESS", nodes.address)
            yield nodes
        finally:
            ray.shutdown()
            nodes.end()


@pytest.fixture
def sweep(cluster, tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()

    def over(task, settings, **options):
        options = {"folder": tmp_path / "results", "progress": False, **options}
        return run_sweep(task, [{"calls": str(calls), **setting} for setting in settings], **options)

    over.calls = calls  # pyright: ignore[reportFunctionMemberAccess]
    return over


@task(version=1)
def on_both_nodes(calls, seed):
    """Wait until tasks run in two processes: on nodes of one CPU, so on both nodes."""
    mark(calls, seed)
    until(lambda: len(workers(calls)) == 2)
    return ray.get_runtime_context().get_node_id()


def test_a_sweep_runs_on_all_nodes(sweep, cluster):
    assert len(set(sweep(on_both_nodes, SEEDS))) == 2


def test_fits_are_those_of_one_process(sweep, tmp_path):
    settings = [{"num_factors": m, "seed": seed} for m in (4, 2) for seed in (0, 1)]
    found = sweep(fit, settings)
    alone = sweep(fit, settings, ray="", threads=1, folder=tmp_path / "alone")
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one.V, other.V) and torch.equal(one.U, other.U) and torch.equal(one.alpha, other.alpha)
    calls = len(calls_of(sweep))
    assert len(sweep(fit, settings)) == len(sweep(fit, settings, ray="")) == 4
    assert len(calls_of(sweep)) == calls


def test_a_worker_that_is_killed_is_started_again_and_changes_no_result(sweep):
    assert sweep(dies_at_first, SEEDS) == [{"third": seed / 3, "threads": 1} for seed in range(4)]
    assert calls_of(sweep) == ["0", "1", "1", "2", "3"]


def test_a_task_that_kills_each_worker_is_named(sweep):
    with pytest.raises(RuntimeError, match=r"process of dies_at_first\(calls=.*, seed=-1\) died 3 times"):
        sweep(dies_at_first, [{"seed": 0}, {"seed": -1}])
    assert calls_of(sweep) == ["0", "_1", "_1", "_1"]


@task(version=1)
def where(calls, seed):
    return str(Path.cwd())


def test_relative_paths_lead_where_they_do_here(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the nodes were started elsewhere
    assert sweep(where, SEEDS) == [str(tmp_path)] * 4


def test_what_a_task_raises_is_raised_here(cluster, tmp_path):
    with pytest.raises(KeyError, match="no such seed") as raised:
        run_sweep(fails, SEEDS[:2], folder=tmp_path, progress=False)
    assert raised.value.__notes__ == ["in fails(seed=1)"]


def test_workers_for_which_no_node_has_room_are_named(cluster, tmp_path):
    for threads, gpus in ((2, 0), (1, 1)):
        with pytest.raises(ValueError, match="1 CPUs and 0 GPUs, 1 CPUs and 0 GPUs; ask for fewer"):
            run_sweep(fails, SEEDS, folder=tmp_path, threads=threads, gpus=gpus, progress=False)


@task(version=1)
def gpus_of(calls, seed):
    mark(calls, seed)
    return len(ray.get_gpu_ids())


def test_a_task_has_a_gpu_where_the_cluster_has_any(cluster, sweep):
    node = cluster.add(f"--address={cluster.address}", "--num-gpus=1")
    try:
        assert sweep(gpus_of, SEEDS[:2]) == [1, 1]
        assert sweep(gpus_of, SEEDS[2:3], gpus=0) == [0]
    finally:
        cluster.lose(node)


def test_a_node_that_is_lost_changes_no_result(cluster, sweep):
    def lose():
        until(lambda: len(workers(sweep.calls)) == 2)
        cluster.lose(cluster.second())
        until(lambda: not all(runs(worker) for worker in workers(sweep.calls)))
        (sweep.calls / "go").touch()

    losing = threading.Thread(target=lose)
    losing.start()
    assert sweep(waits, [{"seed": seed} for seed in range(2, 6)]) == [seed / 3 for seed in range(2, 6)]
    losing.join()
    cluster.add()
    assert len(calls_of(sweep)) == len(["2", "3", "4", "5", "one of them again", "go"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("Llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_model_lies_where_the_driver_finds_it(cluster, folder, texts, monkeypatch):
    monkeypatch.chdir(Path(folder).parent)
    sharded = ShardedMap(Path(folder).name, texts, **WHERE, shards=1, ray=cluster.address)
    assert sharded.source == 1
    sharded.close()


def test_a_map_that_no_shard_can_build_is_a_value_error(cluster, folder, texts):
    with pytest.raises(ValueError, match="source=1, target=9"):
        ShardedMap(folder, texts, source=1, target=9, shards=1, ray=cluster.address)


@pytest.fixture(scope="module")  # from here on its shards hold both CPUs
def maps(cluster, folder, texts):
    model, tokenizer = load_model(folder, dtype="float64", device="cpu")
    sharded = ShardedMap(folder, texts, **WHERE, dtype="float64", shards=2, ray=cluster.address)
    return sharded, CausalMap.from_model(model, tokenizer, texts, **WHERE)


@pytest.mark.parametrize("rows", [1, 5, 6])
def test_every_product_is_that_of_one_process(maps, rows):
    sharded, alone = maps
    theta, v = (4 * unit_rows(rows, D, seed=seed) for seed in (0, 1))
    u = unit_rows(rows, D, seed=2)
    assert_near(sharded(theta), alone(theta), NEAR)
    assert_near(sharded.jvp(theta, v), alone.jvp(theta, v), NEAR)
    assert_near(sharded.vjp(theta, u), alone.vjp(theta, u), NEAR)
    assert_near(sharded.vjp_at_zero(u), alone.vjp_at_zero(u), NEAR)
    for found, expected in zip(sharded.value_and_vjp(theta, u), alone.value_and_vjp(theta, u), strict=True):
        assert found.shape == expected.shape and found.is_contiguous()
        assert_near(found, expected, NEAR)
    assert_near(sharded.second_derivative(theta, v), alone.second_derivative(theta, v), NEAR)
    assert_near(sharded.second_derivative_vjp(u, v), alone.second_derivative_vjp(u, v), NEAR)


def test_it_has_the_facts_of_the_map_in_one_process(maps):
    sharded, alone = maps
    for name in ("d_source", "d_target", "dtype", "device", "scale", "source", "target", "digest"):
        assert getattr(sharded, name) == getattr(alone, name), name
    assert sharded.chunk_size == 2 * alone.chunk_size


def test_fits_take_it_for_the_map_in_one_process(maps, tmp_path):
    options = {"num_factors": 4, "iterations": 2, "progress": False}
    for fit_by, more in [(fit_exponential, options | {"input_scale": 3.0}), (fit_quadratic, options)]:
        found, expected = (fit_by(cmap, **more) for cmap in maps)
        assert_near(found.V, expected.V, 1e-3)
        assert_near(found.alpha, expected.alpha, 1e-3)
    linear, expected = (fit_linear(cmap, num_factors=4, progress=False) for cmap in maps)
    assert_near(linear.alpha, expected.alpha, 1e-5)
    sharded, alone = maps
    kept = cached_fit(tmp_path, fit_linear, sharded, num_factors=2)
    assert torch.equal(cached_fit(tmp_path, fit_linear, alone, num_factors=2).V, kept.V)


def test_a_shard_holds_only_the_blocks_of_its_slice(maps):
    def devices(shard):
        return [next(block.parameters()).device.type for block in shard._built[0]._model.model.layers]

    for shard in maps[0]._shards:
        assert ray.get(shard.__ray_call__.remote(devices)) == ["meta", "cpu", "cpu", "meta"]


def test_shapes_are_checked_as_ever(maps):
    with pytest.raises(ValueError, match=r"got theta of shape \(32,\), expected \(m, 32\)"):
        maps[0](torch.zeros(D))
    with pytest.raises(ValueError, match=r"got arguments of \[3, 4\] rows"):
        maps[0].vjp(torch.zeros(3, D), torch.zeros(4, D))


def test_a_shard_that_is_killed_builds_its_map_again(maps):
    sharded, alone = maps
    theta = 4 * unit_rows(6, D)
    process = ray.get(sharded._shards[1].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(process, signal.SIGKILL)
    assert_near(sharded(theta), alone(theta), NEAR)
    assert ray.get(sharded._shards[1].__ray_call__.remote(lambda _: os.getpid())) != process


def test_bad_maps_are_named(cluster, folder, texts, maps):
    with pytest.raises(ValueError, match="got shards=3 of 1 CPUs and 0 GPUs, expected 1 to 2"):
        ShardedMap(folder, texts, **WHERE, shards=3, ray=cluster.address)


def test_a_closed_map_gives_its_devices_back(cluster, folder, texts, maps):
    maps[0].close()
    with pytest.raises(ray.exceptions.RayActorError):
        maps[0](unit_rows(2, D))
    again = ShardedMap(folder, texts, **WHERE, dtype="float64", shards=2, ray=cluster.address)  # would wait for ever
    assert again.digest == maps[1].digest
    again.close()
