"""Records: one small JSON file for each finished call of a task, committed with the code and checked when read."""

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from tqdm import tqdm

from dctlib._io import atomic_path, write_json
from dctlib.runs.cache import Setting, Task, declared_version, split_tensors, task_key


def record_cells(
    task: Task, settings: Sequence[Setting], *, folder: str | Path, compute: bool = True, progress: bool = True
) -> list[Any]:
    """Return ``[task(**setting) for setting in settings]``, read from the records in `folder`.

    Parameters
    ----------
    task : callable
        A function of a module, declared with :func:`dctlib.runs.cache.task`. It returns JSON, or a dict of JSON and
        tensors.
    settings : sequence of mappings
        Its keyword arguments, as JSON: everything that the result depends on.
    folder : path
        Where the records lie, ``records/<profile>/<stage>``.
    compute : bool
        Compute the missing cells, one at a time. Each is recorded as soon as it is finished.
    progress : bool
        Show a progress bar over the missing cells.

    Raises
    ------
    ValueError
        If cells are missing and `compute` is false, or if a record is damaged or was edited.
    """
    missing = missing_cells(task, settings, folder=folder)
    if missing and not compute:
        raise ValueError(
            f"{len(missing)} of {len(settings)} cells of {task.__name__} have no record in {Path(folder).name}: make "
            f"them with `make study`, or get the records of somebody who did"
        )
    for setting in tqdm(missing, desc=task.__name__, disable=not progress or not missing):
        record_cell(task, setting, folder=folder)
    return [read_record(record_path(task, setting, folder=folder))["result"] for setting in settings]


def missing_cells(task: Task, settings: Sequence[Setting], *, folder: str | Path) -> list[Setting]:
    """Return the settings that have no record in `folder`, each once, in their order."""
    by_path = {record_path(task, setting, folder=folder): setting for setting in settings}
    return [setting for path, setting in by_path.items() if not path.exists()]


def record_path(task: Task, setting: Setting, *, folder: str | Path) -> Path:
    """Return the path of a cell's record: its name is the key of the task, its declared version and the setting."""
    return Path(folder) / f"{task_key(task, setting)}.json"


def record_cell(task: Task, setting: Setting, *, folder: str | Path) -> Path:
    """Compute one cell, write its record and return the record's path.

    The record appears whole or not at all. Tensors of the result lie beside it, in ``<key>.safetensors``.

    Raises
    ------
    ValueError
        If the result is not JSON without NaN, or a dict of such JSON and tensors.
    """
    path = record_path(task, setting, folder=folder)
    start = time.perf_counter()
    tensors, result = split_tensors(task(**setting))
    record = {
        "task": task.__qualname__,
        "version": declared_version(task),
        "setting": dict(setting),
        "result": result,
        "made": _provenance(seconds=time.perf_counter() - start),
    }
    if tensors:
        content = save(tensors)
        record["tensors"] = hashlib.sha256(content).hexdigest()
        with atomic_path(path.with_suffix(".safetensors")) as partial:
            partial.write_bytes(content)
    try:
        record = json.loads(json.dumps(record, allow_nan=False))  # its keys are texts, which sort unlike numbers
        write_json(path, record | {"checksum": _checksum(record)})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected JSON without NaN, or a dict of such JSON and tensors, of {task.__name__}: {error}"
        ) from error
    return path


def read_record(path: str | Path) -> dict[str, Any]:
    """Return the content of a record: ``task``, ``version``, ``setting``, ``result`` (with its tensors) and ``made``.

    Raises
    ------
    ValueError
        If the record or the file of its tensors is damaged or was edited.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("checksum") != _checksum(record):
            raise ValueError("its checksum is that of another content")
        if "tensors" in record:
            content = path.with_suffix(".safetensors").read_bytes()
            if record["tensors"] != hashlib.sha256(content).hexdigest():
                raise ValueError("its tensors are those of another record")
            record["result"] |= load(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the record {path} is damaged or was edited ({error}): restore it with `git checkout`, or delete it and "
            f"compute its cell again"
        ) from error
    return record


def _checksum(record: dict[str, Any]) -> str:
    """Hash the content of a record, whatever its layout: 16 hexadecimal digits."""
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _provenance(seconds: float) -> dict[str, Any]:
    """Return what made a result: versions, hardware, threads, date and seconds."""
    versions = {name: importlib.metadata.version(name) for name in ("dctlib", "torch", "transformers")}
    return {
        **versions,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
    }


def _processor() -> str:
    """Return the name of the GPU, or else of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} × {(names or [platform.machine()])[0]}"


def mismatches(task: Task, recorded: Any, computed: Any) -> list[str]:
    """Compare a computed result of a task with the recorded one: one line for each value that does not agree.

    A number with a fraction, a list of numbers and a tensor agree if the norm of the difference is at most the task's
    declared ``tolerance`` times the recorded norm. Texts, integers and booleans agree if they are equal. The list is
    empty if at least the task's declared ``agreement``, a fraction of 1, of all values agree.
    """
    tensors, rest = split_tensors(computed)
    computed = json.loads(json.dumps(rest))  # as a record holds it: tuples are lists, keys are texts
    declared = vars(task)
    before = dict(_values(recorded))
    after = dict(_values(computed | tensors if tensors else computed))
    differing = [
        f"{place}: recorded {before.get(place)!r:.60}, computed {after.get(place)!r:.60}"
        for place in before | after
        if place not in before or place not in after or not _agree(before[place], after[place], declared["tolerance"])
    ]
    allowed = (1 - declared["agreement"]) * len(before | after)
    return differing if len(differing) > allowed else []


def _values(result: Any, place: str = "result") -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each number, text, tensor and list of numbers in a result."""
    if isinstance(result, dict):
        for name, value in result.items():
            yield from _values(value, f"{place}.{name}")
    elif isinstance(result, list) and not _is_real(result):
        for index, value in enumerate(result):
            yield from _values(value, f"{place}[{index}]")
    else:
        yield place, result


def _is_real(value: Any) -> bool:
    """Return whether a value is a tensor, a number with a fraction, or a list of numbers with at least one."""
    if isinstance(value, list):
        return {float} <= {type(number) for number in value} <= {float, int}
    return isinstance(value, float | torch.Tensor)


def _agree(recorded: Any, computed: Any, tolerance: float) -> bool:
    """Return whether two values of a result agree."""
    if not (_is_real(recorded) and _is_real(computed)):
        return type(recorded) is type(computed) and recorded == computed
    before = torch.as_tensor(recorded, dtype=torch.float64)
    after = torch.as_tensor(computed, dtype=torch.float64)
    return before.shape == after.shape and bool((before - after).norm() <= tolerance * before.norm())
