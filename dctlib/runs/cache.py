"""Results remembered under a key of their inputs and of the version that their task declares."""

import hashlib
import inspect
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dctlib._io import atomic_path, sha256
from dctlib.fits.solvers import FIT_VERSION
from dctlib.fits.transcoder import Transcoder
from dctlib.maps.causal import CausalMap

Task = Callable[..., Any]

Setting = Mapping[str, Any]

EncodedResult = tuple[str, bytes]
"""The suffix and the content of a result's file."""

_JSON = "json"  # in the metadata of a safetensors file: the part of a dict that is not tensors

Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result")


def task(*, version: int, tolerance: float = 1e-3, agreement: float = 1.0) -> Callable[[Function], Function]:
    """Declare the version of a function whose results are remembered, and how nearly a second computation repeats them.

    Parameters
    ----------
    version : int
        Raise it in the same commit as any change that alters the function's results, also a change in what the
        function calls. Renames, moves and faster code keep the version, so they keep the results.
    tolerance : float
        The relative difference between machines that numbers with a fraction may have.
    agreement : float
        The fraction of 1 of a result's values that must agree. Below 1 where texts are generated: another machine may
        choose another token.
    """

    def declare(function: Function) -> Function:
        function.__dict__.update(version=version, tolerance=tolerance, agreement=agreement)
        return function

    return declare


def declared_version(function: Task) -> int:
    """Return the version that :func:`task` declared.

    Raises
    ------
    ValueError
        If the function declares none.
    """
    version = getattr(function, "version", None)
    if not isinstance(version, int):
        raise ValueError(f"{function!r} declares no version, expected @task(version=1) from dctlib.runs.cache above it")
    return version


def task_key(task: Task, setting: Setting) -> str:
    """Return the key of a task's result under a setting, its keyword arguments.

    Raises
    ------
    ValueError
        If the task is not a function of a module or declares no version, or if the setting does not fit its arguments
        or is not JSON.
    """
    name = getattr(task, "__qualname__", "<no name>")
    module = sys.modules.get(task.__module__)
    if "<" in name or not hasattr(module, "__file__"):
        raise ValueError(f"got the task {task!r}, expected a function of a module, with a name: workers import it")
    try:
        inspect.signature(task).bind(**setting)
        return cache_key(name, declared_version(task), setting)
    except (TypeError, ValueError) as error:
        raise ValueError(f"got the setting {setting!r}, expected arguments of {name} as JSON: {error}") from error


def cache_key(name: str, version: int, inputs: Mapping[str, Any]) -> str:
    """Hash a task's name, its version and its JSON-able inputs: 32 hexadecimal digits.

    Raises
    ------
    TypeError, ValueError
        If an input is not JSON, or is NaN or infinite.
    """
    text = json.dumps([name, version, dict(inputs)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def remember(folder: str | Path, key: str, make: Callable[[], Result]) -> Result:
    """Return the result stored in `folder` under `key`, or else call `make`, store what it returns, and return that.

    A run that is killed inside `make` leaves nothing; the next run calls it again.
    """
    stored = read_results(folder, [key])
    return stored[key] if key in stored else write_result(folder, key, encode_result(make()))


def cached_fit(
    folder: str | Path, fit: Callable[..., Transcoder], cmap: CausalMap, **settings: int | float | str
) -> Transcoder:
    """Return ``fit(cmap, **settings)``, computed once for each map and settings and then read from `folder`.

    The key holds the map's digest, the settings, and :data:`dctlib.fits.solvers.FIT_VERSION`.

    Parameters
    ----------
    folder : path
        The folder of remembered results.
    fit : callable
        :func:`dctlib.fit_linear`, :func:`dctlib.fit_quadratic` or :func:`dctlib.fit_exponential`.
    cmap : CausalMap
        The map Δ.
    **settings
        Options of `fit`.
    """
    key = cache_key(fit.__name__, FIT_VERSION, {"map": cmap.digest, **settings})
    return remember(folder, key, lambda: fit(cmap, **settings))


def encode_result(result: Any) -> EncodedResult:
    """Return the suffix and the content of the file for a result: JSON, tensors beside JSON, or a transcoder.

    Raises
    ------
    ValueError
        If the result is something else, or holds NaN or infinity outside of its tensors.
    """
    if isinstance(result, Transcoder):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "transcoder"
            result.save(path)
            return "safetensors", path.read_bytes()
    tensors, rest = split_tensors(result)
    try:
        text = json.dumps(rest, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected JSON without NaN, tensors in a dict, or a Transcoder: {error}") from error
    return ("safetensors", save(tensors, metadata={_JSON: text})) if tensors else ("json", text.encode())


def split_tensors(result: Any) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a result that is a dict, as copies on the CPU, and the rest of the result."""
    if not isinstance(result, dict):
        return {}, result
    tensors = {  # copies, because no file holds two tensors that share memory
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in result.items()
        if isinstance(value, Tensor)
    }
    return tensors, {name: value for name, value in result.items() if name not in tensors}


def write_result(folder: str | Path, key: str, encoded: EncodedResult) -> Any:
    """Write ``<key>.<checksum>.<suffix>``, whole or not at all, and return the result as it is read from there."""
    suffix, content = encoded
    path = Path(folder) / f"{key}.{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"
    with atomic_path(path) as partial:
        partial.write_bytes(content)
    return _read(path)


def read_results(folder: str | Path, keys: Collection[str]) -> dict[str, Any]:
    """Return the results stored under `keys`, by key. A file that its checksum does not match is removed."""
    stored = {}
    for path in Path(folder).glob("*.*.*"):
        key, checksum = path.name.split(".")[:2]
        if key not in keys:
            continue
        if sha256(path)[:16] == checksum:
            stored[key] = _read(path)
        else:
            warnings.warn(f"{path} is damaged; computing it again", stacklevel=3)
            path.unlink()
    return stored


def _read(path: Path) -> Any:
    """Return the result in a file of :func:`write_result`."""
    if path.suffix == ".json":
        return json.loads(path.read_bytes())
    with safe_open(path, framework="pt") as file:
        if text := (file.metadata() or {}).get(_JSON):
            return json.loads(text) | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Transcoder.load(path)
