"""One causal map over many devices: rows are divided among Ray actors, each of which holds the slice of the model."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dctlib.maps.base import DifferentiableMap, Product
from dctlib.maps.causal import CausalMap
from dctlib.models.blocks import get_blocks
from dctlib.models.loading import load_model
from dctlib.runs.cluster import connect, get_result, max_workers

_FACTS = ("d_source", "d_target", "dtype", "scale", "source", "target", "chunk_size", "digest")


class ShardedMap(DifferentiableMap):
    """A causal map whose rows are computed by several Ray actors, equal to :class:`dctlib.CausalMap` up to rounding.

    Rows do not interact in any product, so each actor computes a part of them. Ray starts a killed actor again, and the
    product continues.

    Parameters
    ----------
    model : str
        As in :func:`dctlib.load_model`, on every node: a folder must exist on each.
    texts : sequence of str
        Whole prompts.
    source, target, positions
        As in :meth:`dctlib.CausalMap.from_model`.
    dtype : str, optional
        As in :func:`dctlib.load_model`.
    shards : int
        Number of actors.
    cpus : int
        CPUs, and so threads, of each actor.
    gpus : float
        GPUs of each actor: 1 for a map on GPUs. With more, the blocks of the slice are spread over them.
    ray : str
        The cluster, as in :func:`dctlib.runs.cluster.connect`.

    Attributes
    ----------
    digest : str
        The digest of the map in one process.

    Raises
    ------
    ValueError
        If the actors do not fit on the cluster, if the nodes build different maps, or as
        :meth:`dctlib.CausalMap.from_model` does.
    """

    digest: str

    def __init__(
        self,
        model: str,
        texts: Sequence[str],
        *,
        source: int,
        target: int,
        positions: int = 3,
        dtype: str | None = None,
        shards: int,
        cpus: int = 1,
        gpus: float = 0,
        ray: str = "auto",
    ):
        self._ray = connect(ray)
        most = max_workers(self._ray, cpus=cpus, gpus=gpus)
        if not 1 <= shards <= most:
            raise ValueError(
                f"got shards={shards} of {cpus} CPUs and {gpus:g} GPUs, expected 1 to {most} on this cluster"
            )
        where = {"source": source, "target": target, "positions": positions}
        loading = {"dtype": dtype, "device": "auto" if gpus > 1 else "cuda" if gpus else "cpu"}
        resources = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
        actor = self._ray.remote(_Shard).options(**resources, max_restarts=3, max_task_retries=3)
        model = str(Path(model).resolve()) if Path(model).is_dir() else model  # an actor works in another directory
        self._shards = [actor.remote(model, list(texts), where, loading, cpus) for _ in range(shards)]
        facts = get_result(self._ray, [shard.facts.remote() for shard in self._shards])
        if len({each["digest"] for each in facts}) > 1:
            raise ValueError(f"the nodes build different maps of {model!r}; give all the same files and kind of device")
        for name, value in facts[0].items():
            setattr(self, name, value)
        self.device = torch.device("cpu")
        self.chunk_size = sum(each["chunk_size"] for each in facts)

    def close(self) -> None:
        """End the actors and release their devices. The map computes nothing afterwards."""
        for shard in self._shards:
            self._ray.kill(shard)

    def _product(self, name: Product, **rows: Tensor) -> Tensor:
        def divide(*arguments: Tensor) -> Tensor:
            parts = zip(*(each.tensor_split(min(len(each), len(self._shards))) for each in arguments), strict=True)
            calls = [
                # A copy, because a view is sent with its whole tensor.
                shard.product.remote(name, {key: value.clone() for key, value in zip(rows, part, strict=True)})
                for shard, part in zip(self._shards, parts, strict=False)
            ]
            return torch.cat(get_result(self._ray, calls))

        return self._chunked(divide, **rows)


class _Shard:
    """An actor with the map on its device, built at the first call so that the caller receives its exception."""

    def __init__(self, model: str, texts: list[str], where: dict[str, Any], loading: dict[str, Any], threads: int):
        self._recipe = model, texts, where, loading
        torch.set_num_threads(threads)

    @cached_property
    def _built(self) -> tuple[CausalMap, dict[str, Any]]:
        name, texts, where, loading = self._recipe
        model, tokenizer = load_model(name, **loading)
        cmap = CausalMap.from_model(model, tokenizer, texts, **where)
        facts = {
            fact: getattr(cmap, fact) for fact in _FACTS
        }  # before weights are dropped, because the digest hashes them
        blocks = list(get_blocks(model))
        unused: list[Any] = [*blocks[: where["source"]], *blocks[where["target"] :]]
        for module in [*unused, model.get_input_embeddings(), model.get_output_embeddings()]:
            module.to("meta")
        return cmap, facts

    def facts(self) -> dict[str, Any]:
        return self._built[1]

    def product(self, name: Product, rows: dict[str, Tensor]) -> Tensor:
        return self._built[0]._product(name, **rows).cpu()
