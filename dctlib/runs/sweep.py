"""Sweeps: one task over many settings, in processes of this machine or on a Ray cluster, each result computed once."""

import hashlib
import json
import multiprocessing
import os
import platform
import tempfile
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from dctlib._io import atomic_path, sha256
from dctlib.fits.transcoder import Transcoder
from dctlib.runs.cache import Setting, Task, split_tensors, task_key
from dctlib.runs.cluster import connect, get_result, max_workers

File = tuple[str, bytes]  # the suffix of a result's file and its content: all that travels back from a worker

_REST = "json"  # in the metadata of a safetensors file: what of a dict is no tensor


def run_sweep(
    task: Task,
    settings: Sequence[Setting],
    *,
    folder: str | Path,
    workers: int | None = None,
    threads: int | None = None,
    gpus: float | None = None,
    attempts: int = 3,
    ray: str | None = None,
    progress: bool = True,
) -> list[Any]:
    """``[task(**setting) for setting in settings]``, several at a time, each computed once and then read from `folder`.

    A result is written as soon as it is there, whole or not at all, so a sweep that was killed goes on where it was. It
    is one file, ``<key>.<checksum>.json`` or ``.safetensors``: the key is a hash of all that the result depends on, and
    the checksum tells damage, after which the result is computed again.

    Parameters
    ----------
    task : callable
        A function of a module, so that workers can import it. It gives JSON, a dict of tensors and JSON, or a
        :class:`dctlib.Transcoder`. Editing its module, or a file of this library behind that, makes results stale.
    settings : sequence of mappings
        Its keyword arguments, as JSON: everything that the result depends on, so also the digest of a model that may be
        trained again under its name. Equal settings are computed once.
    folder : path
        Where results lie.
    workers : int, optional
        Tasks at a time. Left out, one, in this process; on a cluster, as many as its nodes hold.
    threads : int, optional
        Of torch, for each task. Left out, this process's, divided among the workers; one on a cluster. The number of
        workers changes no result but by this: another number of threads rounds differently.
    gpus : float, optional
        That Ray sets aside for each task. Left out, one where the cluster has any.
    attempts : int
        How often a task is started, if its process is killed each time. An exception is no kill: it is raised once the
        tasks that run beside it are done and kept.
    ray : str, optional
        A cluster, as :func:`dctlib.runs.cluster.connect` takes it. Left out, the environment's ``RAY_ADDRESS``; where
        that is not set, or for ``""``, processes of this machine.
    progress : bool
        Show a progress bar.

    Returns
    -------
    list
        Results in the order of `settings`, as they are read from their files.

    Raises
    ------
    ValueError
        If an option is out of range, the task is not a function of a module, a setting or result is not JSON, or a
        node of the cluster has other code than this process.
    RuntimeError
        If the process of one task was killed in all attempts.
    ImportError
        If a cluster is named and Ray is not installed.
    """
    if any(count is not None and count < 1 for count in (workers, threads, attempts)) or (gpus or 0) < 0:
        raise ValueError(
            f"got workers={workers}, threads={threads}, attempts={attempts}, gpus={gpus}, expected at least 1, and of "
            f"gpus at least 0"
        )
    keys, folder = [task_key(task, setting) for setting in settings], Path(folder)
    found = _kept(folder, keys)
    missing = {key: setting for key, setting in zip(keys, settings, strict=True) if key not in found}
    address = os.environ.get("RAY_ADDRESS", "") if ray is None else ray
    if not missing:
        return [found[key] for key in keys]
    if address:
        workers, runner = _on_cluster(task, connect(address), workers, threads or 1, gpus, attempts)
    else:
        workers = workers or 1
        threads = threads or max(1, torch.get_num_threads() // workers)
        here = nullcontext(partial(_file, task, threads))
        runner = here if workers == 1 else _in_processes(task, workers, threads, attempts)
    bar = tqdm(total=len(set(keys)), initial=len(found), desc=task.__name__, disable=not progress)
    with runner as run, bar:

        def compute(key: str) -> None:
            try:
                file = run(missing[key])
            except Exception as error:
                error.add_note(f"in {_call(task, missing[key])}")
                raise
            found[key] = _read(_written(folder, key, file))
            bar.update()

        _at_a_time(workers, compute, list(missing))
    return [found[key] for key in keys]


def _at_a_time(workers: int, compute: Callable[[str], None], keys: Sequence[str]) -> None:
    """`compute` every key; a thread does nothing but wait for its worker and write what comes."""
    if workers == 1:
        for key in keys:
            compute(key)
        return
    with ThreadPoolExecutor(workers) as waiting:
        futures = [waiting.submit(compute, key) for key in keys]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            waiting.shutdown(wait=False, cancel_futures=True)  # leaving the block waits for those that run
            raise


@contextmanager
def _in_processes(task: Task, workers: int, threads: int, attempts: int) -> Iterator[Callable[[Setting], File]]:
    """Run each setting in one of `workers` processes.

    Each is a pool of its own: a pool of several breaks as a whole when one is killed, and does not say by whose task.
    """
    idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
    for _ in range(workers):
        idle.put(_process())

    def run(setting: Setting) -> File:
        process = idle.get()
        try:
            for _ in range(attempts):
                try:
                    return process.submit(_file, task, threads, setting).result()
                except BrokenProcessPool:
                    process.shutdown()
                    process = _process()
        finally:
            idle.put(process)
        raise RuntimeError(_killed(task, setting, attempts))

    try:
        yield run
    finally:
        while not idle.empty():
            idle.get().shutdown()


def _process() -> ProcessPoolExecutor:
    """One worker, started at its first task. Spawned, as a fork of a process with threads may hang."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_follow_driver)


def _follow_driver() -> None:
    """End with the driver: a worker whose driver was killed would finish its task for nobody and then wait for ever."""
    driver = multiprocessing.parent_process()

    def follow() -> None:
        if driver:
            driver.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _on_cluster(
    task: Task, ray: Any, workers: int | None, threads: int, gpus: float | None, attempts: int
) -> tuple[int, nullcontext[Callable[[Setting], File]]]:
    """Run each setting on a node of the cluster, which starts it again if its worker or its node is killed."""
    gpus = float("GPU" in ray.cluster_resources()) if gpus is None else gpus
    most = max_workers(ray, cpus=threads, gpus=gpus)
    options = {"num_cpus": threads, "num_gpus": gpus, "max_retries": attempts - 1, "scheduling_strategy": "SPREAD"}
    remote = ray.remote(_file_from).options(**options)

    def run(setting: Setting) -> File:
        try:
            return get_result(ray, remote.remote(Path.cwd(), task_key(task, setting), task, threads, setting))
        except ray.exceptions.RayError as error:
            raise RuntimeError(_killed(task, setting, attempts)) from error

    return workers or most, nullcontext(run)


def _file_from(folder: Path, key: str, task: Task, threads: int, setting: Setting) -> File:
    """:func:`_file` in the driver's working directory, where its relative paths lead: a node's own is another one.

    Nor may a node that runs other code than the driver give a result under the driver's key.
    """
    os.chdir(folder)
    if task_key(task, setting) != key:
        raise ValueError(
            f"{platform.node()} has another {task.__module__}, or another dctlib behind it, than the driver; give all "
            f"nodes the same checkout"
        )
    return _file(task, threads, setting)


def _file(task: Task, threads: int, setting: Setting) -> File:
    """What the task gives, as a file. Of a tensor that travels as it is, torch would send a handle to shared memory."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = task(**setting)
    finally:
        torch.set_num_threads(before)
    if isinstance(result, Transcoder):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "result"
            result.save(path)
            return "safetensors", path.read_bytes()
    tensors, rest = split_tensors(result)
    try:
        if tensors:
            return "safetensors", save(tensors, metadata={_REST: _json(rest)})
        return "json", _json(rest).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected JSON without NaN, tensors in a dict, or a Transcoder, of {task.__name__}: {error}"
        ) from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _written(folder: Path, key: str, file: File) -> Path:
    suffix, content = file
    path = folder / f"{key}.{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"
    with atomic_path(path) as partial:
        partial.write_bytes(content)
    return path


def _kept(folder: Path, keys: Collection[str]) -> dict[str, Any]:
    """Results that are there already, by key; damaged ones are removed."""
    found, wanted = {}, set(keys)
    for path in folder.glob("*.*.*"):
        key, checksum = path.name.split(".")[:2]
        if key not in wanted:
            continue
        if sha256(path)[:16] == checksum:
            found[key] = _read(path)
        else:
            warnings.warn(f"{path} is damaged; computing it again", stacklevel=3)
            path.unlink()
    return found


def _read(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_bytes())
    with safe_open(path, framework="pt") as file:
        if rest := (file.metadata() or {}).get(_REST):
            return json.loads(rest) | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Transcoder.load(path)


def _call(task: Task, setting: Setting) -> str:
    return f"{task.__name__}({', '.join(f'{name}={value!r}' for name, value in setting.items())})"


def _killed(task: Task, setting: Setting, attempts: int) -> str:
    return (
        f"the process of {_call(task, setting)} died {attempts} times: was memory short (take fewer workers), or can "
        f"it not import the task (see above)? What the others gave is kept"
    )
