"""Steering vectors as GGUF control vectors, the files that llama.cpp's ``--control-vector``, repeng and EasySteer read.

A control vector holds one tensor ``direction.N`` for each block N that it steers, as
:mod:`dctlib.exchange.directions` says. llama.cpp refuses a file with a ``direction.0``, because it steers no block
before block 1. So layers 0 and 1 have no place in such a file.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float
from torch import Tensor

from dctlib._io import atomic_path
from dctlib.exchange.directions import from_directions, to_directions

_ARCHITECTURE, _KIND = "general.architecture", "controlvector"

_DIGEST = "dctlib.sha256"  # our own key, because GGUF has no checksum; other readers ignore it


def write_control_vector(path: str | Path, vectors: Mapping[int, Float[Tensor, " d"]], *, architecture: str) -> None:
    """Write steering vectors as one GGUF control vector, whole or not at all.

    Parameters
    ----------
    path : path
        The file to write, usually ``*.gguf``.
    vectors : mapping of int to Tensor or numpy array, (d,)
        Layer → the vector that is added at it: ``{dct.source: R * dct.V[0]}``. The length of the vector is the
        strength, so that llama.cpp's default scale of 1 is right. Stored in float32.
    architecture : str
        ``model.config.model_type`` of the steered model, as a note: llama.cpp checks only the width.

    Raises
    ------
    ValueError
        If there is no vector, a layer is below 2, or a vector is not finite or not as wide as the others.
    """
    if not architecture:
        raise ValueError(f"got architecture={architecture!r}, expected the model's type, as in model.config.model_type")
    directions = {
        f"direction.{block}": direction.float().numpy() for block, direction in to_directions(vectors, lowest=2).items()
    }
    _check_names(directions, "vectors")
    with atomic_path(path) as partial:
        writer = gguf.GGUFWriter(partial, _KIND)
        writer.add_string(f"{_KIND}.model_hint", architecture)
        writer.add_uint32(f"{_KIND}.layer_count", len(directions))
        writer.add_string(_DIGEST, _digest(directions))
        for name, direction in directions.items():
            writer.add_tensor(name, direction)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_control_vector(path: str | Path) -> dict[int, Float[Tensor, " d"]]:
    """Read a GGUF control vector of ours, of repeng, or of llama.cpp's cvector-generator.

    Returns
    -------
    dict of int to Tensor, (d,)
        Layer → vector, float32, as :func:`dctlib.steer` takes them. A file of ours holds what was written, bit for bit.
        Others hold a direction for nearly every block, meant to be added together, and often of unit length. A
        direction of the last block comes back at the number of blocks, where ``steer`` adds it to that block's output.

    Raises
    ------
    ValueError
        If the file is missing or damaged, is no control vector, or holds anything that llama.cpp would not add.
    """
    try:
        reader = _Reader(path)
        fields = {key: reader.fields[key].contents() for key in (_ARCHITECTURE, _DIGEST) if key in reader.fields}
    except (OSError, ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}); fetch or export it again") from error
    if (kind := fields.get(_ARCHITECTURE)) != _KIND:
        raise ValueError(f"{path} is a GGUF file of architecture {kind!r}, expected {_KIND!r}; is it a model?")
    directions = {tensor.name: tensor.data for tensor in reader.tensors}
    _check_names(directions, str(path))
    if fields.get(_DIGEST, found := _digest(directions)) != found:
        raise ValueError(f"{path} is damaged: its directions do not have the SHA-256 that it names; export it again")
    return from_directions({int(name.removeprefix("direction.")): held for name, held in directions.items()}, str(path))


class _Reader(gguf.GGUFReader):
    """A reader that refuses a file that ends too early, because gguf's own returns fewer values without an error."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        found = super()._get(offset, dtype, count, override_order)
        if len(found) != count:
            raise ValueError("it ends too early")
        return found


def _check_names(directions: Mapping[str, np.ndarray], what: str) -> None:
    """Refuse tensors that llama.cpp's ``common_control_vector_load`` refuses for their name or type."""
    for name, direction in directions.items():
        if not re.fullmatch(r"direction\.[1-9][0-9]{0,5}", name):
            raise ValueError(f"{what}: got a tensor {name!r}, expected direction.N with N of 1 or more")
        if direction.dtype.newbyteorder("=") != np.float32:
            raise ValueError(f"{what}: {name} is {direction.dtype} {direction.shape}, expected float32 (d,)")


def _digest(directions: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of names and little-endian values, in the order of the names."""
    digest = hashlib.sha256()
    for name, direction in sorted(directions.items()):
        digest.update(name.encode() + b"\0" + direction.astype("<f4").tobytes())
    return digest.hexdigest()
