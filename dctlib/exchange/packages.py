"""Steering vectors to and from the objects of two Python packages, repeng and steering-vectors.

Both add a direction to the output of each block, as :mod:`dctlib.exchange.directions` says. So they cannot steer layer
0, and their direction of the last block comes back at the number of blocks. Neither package is needed to read its
objects. Add all vectors of an object together, as it does::

    with contextlib.ExitStack() as stack:
        for layer, vector in from_repeng(control_vector).items():
            stack.enter_context(steer(model, layer=layer, vector=vector))
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from dctlib.exchange.directions import from_directions, to_directions

_BLOCK_OUTPUT = "decoder_block"  # steering-vectors' name of the place where it adds, unless told otherwise


def to_repeng(vectors: Mapping[int, Float[Tensor, " d"]], *, architecture: str) -> Any:
    """Return a ``repeng.ControlVector`` that steers as `vectors` do, at repeng's default coefficient of 1.

    Parameters
    ----------
    vectors : mapping of int to Tensor or numpy array, (d,)
        Layer → the vector that is added at it. Stored in float32, as repeng trains them.
    architecture : str
        ``model.config.model_type`` of the steered model, which repeng keeps as a note.

    Returns
    -------
    repeng.ControlVector
        For a ``repeng.ControlModel`` of exactly the blocks in its ``directions``, because repeng asks for each.

    Raises
    ------
    ValueError
        If repeng is not installed, a layer is below 1, or a vector is not finite or not as wide as the others.
    """
    directions = {block: direction.float().numpy().copy() for block, direction in to_directions(vectors).items()}
    return _repeng().ControlVector(architecture, directions)


def from_repeng(control_vector: Any) -> dict[int, Float[Tensor, " d"]]:
    """Return the steering vectors of a ``repeng.ControlVector``, by layer.

    Parameters
    ----------
    control_vector : repeng.ControlVector
        Or any object with ``directions``: block → numpy array or Tensor, (d,).

    Returns
    -------
    dict of int to Tensor, (d,)
        Layer → vector. Adding them all is repeng's ``set_control(control_vector)`` for a model that controls those
        blocks. Multiply them by its ``coeff``. ``normalize=True`` and other ``operator`` have no equivalent.

    Raises
    ------
    ValueError
        If there is no direction, or one belongs to no block, or is not finite or not as wide as the others.
    """
    return from_directions(_mapping(control_vector, "directions"), "the control vector")


def to_steering_vectors(vectors: Mapping[int, Float[Tensor, " d"]]) -> Any:
    """Return a ``steering_vectors.SteeringVector`` that steers as `vectors` do, at its default multiplier of 1.

    Parameters
    ----------
    vectors : mapping of int to Tensor or numpy array, (d,)
        Layer → the vector that is added at it. The dtype stays.

    Raises
    ------
    ValueError
        If steering-vectors is not installed, a layer is below 1, or a vector is not finite or not as wide as the
        others.
    """
    directions = {block: direction.clone() for block, direction in to_directions(vectors).items()}
    try:
        from steering_vectors import SteeringVector  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("steering-vectors is not installed; pip install --no-deps steering-vectors") from error
    return SteeringVector(layer_activations=directions, layer_type=_BLOCK_OUTPUT)


def from_steering_vectors(steering_vector: Any) -> dict[int, Float[Tensor, " d"]]:
    """Return the steering vectors of a ``steering_vectors.SteeringVector``, by layer.

    Parameters
    ----------
    steering_vector : steering_vectors.SteeringVector
        Or any object with ``layer_activations``: block → Tensor or numpy array, (d,).

    Returns
    -------
    dict of int to Tensor, (d,)
        Layer → vector. Adding them all is its ``apply(model)``. Multiply them by its ``multiplier``. An
        ``operator`` other than addition has no equivalent.

    Raises
    ------
    ValueError
        If its ``layer_type`` is another place than the output of a block, there is no vector, or one belongs to no
        block, or is not finite or not as wide as the others.
    """
    place = getattr(steering_vector, "layer_type", _BLOCK_OUTPUT)
    if place != _BLOCK_OUTPUT:
        raise ValueError(
            f"got a steering vector of layer_type={place!r}, expected {_BLOCK_OUTPUT!r}: steer() adds between blocks, "
            f"not inside them; train it with layer_type={_BLOCK_OUTPUT!r}"
        )
    return from_directions(_mapping(steering_vector, "layer_activations"), "the steering vector")


def _mapping(held: Any, name: str) -> Mapping[int, Any]:
    found = getattr(held, name, None)
    if not isinstance(found, Mapping):
        raise ValueError(f"got {type(held).__name__}, expected an object with {name}: a dict of block to vector")
    return found


def _repeng() -> Any:
    """Import repeng. Release 0.4 names NumPy 1's ``float_`` in annotations, so NumPy 2 needs that name meanwhile."""
    missing = not hasattr(np, "float_")
    if missing:
        np.__dict__["float_"] = np.float64
    try:
        import repeng  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("repeng is not installed; pip install --no-deps repeng") from error
    finally:
        if missing:
            del np.__dict__["float_"]
    return repeng
