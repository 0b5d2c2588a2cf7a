"""Sweeps: one task over many settings, in processes of this machine or on a Ray cluster, each result computed once."""

import hashlib
import inspect
import multiprocessing
import os
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from tqdm import tqdm

from dctlib._io import sha256
from dctlib.runs.cache import EncodedResult, Setting, Task, encode_result, read_results, task_key, write_result
from dctlib.runs.cluster import connect, get_result, max_workers

_ATTEMPTS = 3  # of a task whose process is killed


def run_sweep(
    task: Task,
    settings: Sequence[Setting],
    *,
    folder: str | Path,
    workers: int | None = None,
    threads: int | None = None,
    gpus: float | None = None,
    ray: str | None = None,
    progress: bool = True,
) -> list[Any]:
    """Return ``[task(**setting) for setting in settings]``, several computed at a time, each once.

    Each result is written to `folder` as soon as it is computed, so a sweep that was killed resumes. The file is
    ``<key>.<checksum>.json`` or ``.safetensors``, whole or absent. A damaged file is computed again. A task
    whose process is killed is started again, three times in all. An exception is raised when the tasks that run beside
    it are finished and stored.

    Parameters
    ----------
    task : callable
        A function of a module, so that workers can import it, declared with :func:`dctlib.runs.cache.task`. It returns
        JSON, a dict of tensors and JSON, or a :class:`dctlib.Transcoder`.
    settings : sequence of mappings
        Its keyword arguments, as JSON: everything that the result depends on, so also the digest of a model that may be
        trained again under its name. Equal settings are computed once.
    folder : path
        The folder of results.
    workers : int, optional
        Number of tasks at a time. By default one, in this process; on a cluster, as many as its nodes hold.
    threads : int, optional
        Number of torch's threads for each task. By default this process's, divided among the workers; one on a cluster.
        Another number of threads rounds differently. Otherwise the number of workers does not change results.
    gpus : float, optional
        GPUs that Ray reserves for each task. By default one where the cluster has any.
    ray : str, optional
        A cluster, as :func:`dctlib.runs.cluster.connect` takes it. Default: the environment's ``RAY_ADDRESS``. Without
        that, and for ``""``, tasks run in processes of this machine.
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
        If the process of one task was killed three times.
    ImportError
        If a cluster is named and Ray is not installed.
    """
    if any(count is not None and count < 1 for count in (workers, threads)) or (gpus or 0) < 0:
        raise ValueError(
            f"got workers={workers}, threads={threads}, gpus={gpus}, expected at least 1 of each and at least 0 gpus"
        )
    keys = [task_key(task, setting) for setting in settings]
    results = read_results(folder, keys)
    missing = {key: setting for key, setting in zip(keys, settings, strict=True) if key not in results}
    if not missing:
        return [results[key] for key in keys]
    address = os.environ.get("RAY_ADDRESS", "") if ray is None else ray
    if address:
        workers, runner = _cluster_runner(task, connect(address), workers, threads or 1, gpus)
    else:
        workers = workers or 1
        threads = threads or max(1, torch.get_num_threads() // workers)
        runner = _process_runner(task, workers, threads)
    bar = tqdm(total=len(set(keys)), initial=len(results), desc=task.__name__, disable=not progress)
    with runner as run_task, bar:

        def compute(key: str) -> None:
            try:
                encoded = run_task(missing[key])
            except Exception as error:
                error.add_note(f"in {_format_call(task, missing[key])}")
                raise
            results[key] = write_result(folder, key, encoded)
            bar.update()

        if workers == 1:
            for key in missing:
                compute(key)
        else:
            with ThreadPoolExecutor(workers) as pool:  # a thread only waits for its worker and writes the result
                for _ in pool.map(compute, missing):  # an exception cancels what has not started
                    pass
    return [results[key] for key in keys]


@contextmanager
def _process_runner(task: Task, workers: int, threads: int) -> Iterator[Callable[[Setting], EncodedResult]]:
    """Yield a function that runs a setting in an idle one of `workers` processes; one worker is this process.

    Each process is a pool of its own, because a pool of several breaks as a whole when one of them is killed.
    """
    if workers == 1:
        yield partial(_run_task, task, threads)
        return
    idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
    for _ in range(workers):
        idle.put(_start_process())

    def run(setting: Setting) -> EncodedResult:
        process = idle.get()
        try:
            for _ in range(_ATTEMPTS):
                try:
                    return process.submit(_run_task, task, threads, setting).result()
                except BrokenProcessPool:
                    process.shutdown()
                    process = _start_process()
        finally:
            idle.put(process)
        raise RuntimeError(_explain_kill(task, setting))

    try:
        yield run
    finally:
        while not idle.empty():
            idle.get().shutdown()


def _start_process() -> ProcessPoolExecutor:
    """Return a pool of one process, spawned because the fork of a process with threads may hang."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_driver)


def _end_with_driver() -> None:
    """End this process when the driver's ends, because nobody would read its result."""
    driver = multiprocessing.parent_process()

    def wait() -> None:
        if driver:
            driver.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _cluster_runner(
    task: Task, ray: Any, workers: int | None, threads: int, gpus: float | None
) -> tuple[int, nullcontext[Callable[[Setting], EncodedResult]]]:
    """Return the number of workers and a function that runs a setting on a node; Ray starts it again after a kill."""
    gpus = float("GPU" in ray.cluster_resources()) if gpus is None else gpus
    most = max_workers(ray, cpus=threads, gpus=gpus)
    options = {"num_cpus": threads, "num_gpus": gpus, "max_retries": _ATTEMPTS - 1, "scheduling_strategy": "SPREAD"}
    remote = ray.remote(_run_on_node).options(**options)
    code = _digest_code(task)

    def run(setting: Setting) -> EncodedResult:
        try:
            return get_result(ray, remote.remote(Path.cwd(), code, task, threads, setting))
        except ray.exceptions.RayError as error:
            raise RuntimeError(_explain_kill(task, setting)) from error

    return workers or most, nullcontext(run)


def _run_on_node(folder: Path, code: str, task: Task, threads: int, setting: Setting) -> EncodedResult:
    """Run a setting in the driver's working directory, where relative paths lead to the driver's files."""
    os.chdir(folder)
    if _digest_code(task) != code:  # its result would lie under the driver's key
        raise ValueError(
            f"{platform.node()} has another {task.__module__}, or another dctlib behind it, than the driver; give all "
            f"nodes the same checkout"
        )
    return _run_task(task, threads, setting)


def _digest_code(task: Task) -> str:
    """Return a hash of the task's module and of all modules of this library."""
    library = Path(__file__).parents[1]
    files = [Path(inspect.getfile(task)), *sorted(library.rglob("*.py"))]
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()


def _run_task(task: Task, threads: int, setting: Setting) -> EncodedResult:
    """Return the result as bytes, because torch would send a worker's tensor as a handle to shared memory."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return encode_result(task(**setting))
    finally:
        torch.set_num_threads(before)


def _format_call(task: Task, setting: Setting) -> str:
    return f"{task.__name__}({', '.join(f'{name}={value!r}' for name, value in setting.items())})"


def _explain_kill(task: Task, setting: Setting) -> str:
    return (
        f"the process of {_format_call(task, setting)} died {_ATTEMPTS} times: memory may be short (use fewer "
        f"workers), or it cannot import the task (see above); the other results are stored"
    )
