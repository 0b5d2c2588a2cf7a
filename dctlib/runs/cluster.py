"""A Ray cluster: its connection, its capacity and the results of its workers. Ray is an optional dependency."""

import importlib
import math
from typing import Any


def connect(address: str) -> Any:
    """Return the module ``ray``, connected to the cluster at `address` unless it is connected already.

    Parameters
    ----------
    address : str
        As ``ray.init`` takes it: ``"auto"`` on a node of the cluster, ``"host:port"``, or ``"local"`` for a new one.

    Raises
    ------
    ImportError
        If Ray is not installed.
    ValueError
        If there is no such cluster.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(
            f"got a Ray cluster, {address!r}, but Ray is not installed: pip install 'dctlib[ray]', or leave `ray` and "
            f"RAY_ADDRESS empty to work on this machine alone"
        ) from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)  # many workers' progress bars would drown the driver's
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"no Ray cluster at {address!r} ({error}); start one with `ray start --head`, or give its host:port"
            ) from error
    return ray


def max_workers(ray: Any, *, cpus: int, gpus: float) -> int:
    """Return how many workers of `cpus` CPUs and `gpus` GPUs each fit on the nodes of a cluster.

    Raises
    ------
    ValueError
        If none fits, because Ray would wait for ever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = sum(int(min(node.get("CPU", 0) / cpus, node.get("GPU", 0) / gpus if gpus else math.inf)) for node in nodes)
    if not total:
        has = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ValueError(f"got workers of {cpus} CPUs and {gpus:g} GPUs, but the nodes have {has}; ask for fewer")
    return total


def get_result(ray: Any, reference: Any) -> Any:
    """Return the result of a remote call, or of each in a list, and raise its exception as one of this process."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
