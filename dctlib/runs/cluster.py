"""A Ray cluster: connecting to one, what it has room for, and what its processes answer. Ray itself is optional."""

import importlib
import math
from typing import Any


def connect(address: str) -> Any:
    """The module ``ray``, connected to the cluster at `address`, or to the one that it is connected to already.

    Parameters
    ----------
    address : str
        As ``ray.init`` takes it: ``"auto"`` on a node of the cluster, ``"host:port"``, or ``"local"``, one of its own.

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
    """How many workers of so many CPUs and GPUs the nodes of a cluster hold together, each on one node.

    Raises
    ------
    ValueError
        If there is room for none: Ray would wait for ever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = sum(int(min(node.get("CPU", 0) / cpus, node.get("GPU", 0) / gpus if gpus else math.inf)) for node in nodes)
    if not found:
        has = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ValueError(f"got workers of {cpus} CPUs and {gpus:g} GPUs, but the nodes have {has}; ask for fewer")
    return found


def get_result(ray: Any, reference: Any) -> Any:
    """What a remote call, or each of a list of them, gave; an exception of it is raised as if it had come up here."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
