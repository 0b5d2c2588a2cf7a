"""Steering: adding a vector to the residual stream of a running model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dctlib.models import blocks_of, check_layer, width_of


@contextmanager
def steer(model: PreTrainedModel, *, layer: int, vector: Float[Tensor, "*batch d"]) -> Iterator[None]:
    """Add `vector` to h_layer, the input of block `layer`, at every position, while the block of code runs.

    It holds for the prompt and for every token generated after it, with and without a cache, and is gone afterwards,
    also after an exception. Contexts nest: their vectors add.

    Parameters
    ----------
    model : PreTrainedModel
        Any model that :func:`dctlib.models.blocks_of` knows.
    layer : int
        The layer at which the vector was fitted (the transcoder's ``source``).
    vector : Tensor, (d,) or (batch, d)
        One vector for all rows of the batch, or one for each. Its length is the strength: pass ``R * v``.

    Raises
    ------
    ValueError
        If the layer or the shape does not fit the model, the vector is not finite, or the batch has another number
        of rows than the vector.
    """
    check_layer(model, layer)
    d = width_of(model)
    if vector.ndim not in (1, 2) or vector.shape[-1] != d:
        raise ValueError(f"got a vector of shape {tuple(vector.shape)}, expected ({d},) or (batch, {d})")
    if not vector.isfinite().all():
        raise ValueError("the steering vector is not finite")

    def add(_block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (added(args[0], vector), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": added(kwargs["hidden_states"], vector)}

    handles = []
    try:
        handles.append(blocks_of(model)[layer].register_forward_pre_hook(add, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def added(
    hidden: Float[Tensor, "batch tokens d"], vector: Float[Tensor, "*batch d"]
) -> Float[Tensor, "batch tokens d"]:
    """`hidden` with `vector`, or row i of `vector` in row i, added at every position."""
    vector = vector.to(hidden.device, hidden.dtype)
    if vector.ndim == 2 and len(vector) not in (1, len(hidden)):
        raise ValueError(f"got {len(vector)} vectors for a batch of {len(hidden)} rows, expected one vector a row")
    return hidden + (vector if vector.ndim == 1 else vector[:, None])
