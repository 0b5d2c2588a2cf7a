"""Steering vectors as directions of blocks, the form in which llama.cpp, repeng and others count and add them.

Their direction N is added to the *output* of block N, counted from 0, at every position. dctlib's layer s is the
*input* of block s, which is the output of block s − 1. So

    layer s  ↔  direction s − 1    for s ≥ 1,

and the number of blocks is the layer of the last block's direction.
"""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def to_directions(vectors: Mapping[int, Float[Tensor, " d"]], *, lowest: int = 1) -> dict[int, Float[Tensor, " d"]]:
    """Return the direction of each block from steering vectors by layer.

    Parameters
    ----------
    vectors : mapping of int to Tensor or numpy array, (d,)
        Layer → vector, as :func:`dctlib.steer` takes them.
    lowest : int
        The lowest layer that the other tool can steer.

    Returns
    -------
    dict of int to Tensor, (d,)
        Block → direction, on the CPU, in its own dtype.

    Raises
    ------
    ValueError
        If there is no vector, a layer is below `lowest`, or :func:`check_directions` refuses a vector.
    """
    if not vectors:
        raise ValueError("got 0 vectors, expected at least one")
    for layer in vectors:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or layer < lowest:
            raise ValueError(
                f"got layer={layer!r}, expected {lowest} or more: the other tool adds to the output of block "
                f"{lowest - 1} or of a later one, which is the input of block {lowest}. Fit at a later source "
                f"layer, or use dctlib.exchange.steered_model.steered_copy"
            )
    directions = {int(layer) - 1: torch.as_tensor(vector).detach().cpu() for layer, vector in vectors.items()}
    check_directions(directions, "vectors")
    return directions


def from_directions(directions: Mapping[int, Any], name: str) -> dict[int, Float[Tensor, " d"]]:
    """Return steering vectors by layer from the directions of blocks.

    Parameters
    ----------
    directions : mapping of int to Tensor or numpy array, (d,)
        Block → direction.
    name : str
        What holds them, for messages.

    Returns
    -------
    dict of int to Tensor, (d,)
        Layer → vector, copied to the CPU, in its own dtype.

    Raises
    ------
    ValueError
        If a block is not a number of 0 or more, or :func:`check_directions` refuses a direction.
    """
    for block in directions:
        if isinstance(block, bool) or not isinstance(block, Integral) or block < 0:
            raise ValueError(
                f"{name}: got block {block!r}, expected 0 or more; count a block from the start, as in "
                f"number_of_blocks - 1 for the last"
            )
    copies = {int(block): _copied(direction) for block, direction in directions.items()}
    check_directions(copies, name)
    return {block + 1: direction for block, direction in copies.items()}


def check_directions(directions: Mapping[int, Float[Tensor, " d"]], name: str) -> None:
    """Raise ValueError unless there are directions, of one width, of floating type and finite in float32."""
    for block, direction in directions.items():
        held = f"{name}: direction.{block} is {str(direction.dtype).removeprefix('torch.')} {tuple(direction.shape)}"
        if direction.ndim != 1 or not direction.numel() or not direction.is_floating_point():
            raise ValueError(f"{held}, expected floating numbers (d,)")
        if not direction.float().isfinite().all():
            raise ValueError(f"{name}: direction.{block} is not finite in float32")
    if len(widths := {direction.numel() for direction in directions.values()}) != 1:
        raise ValueError(f"{name}: got directions of widths {sorted(widths)}, expected at least one, and one width")


def _copied(direction: Any) -> Tensor:
    if isinstance(direction, Tensor):
        return direction.detach().cpu().clone()
    array = np.array(direction)
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        raise ValueError(f"got a direction of {array.dtype}, expected floating numbers") from error
