"""Counting forward and backward passes, so that methods can be compared at equal budgets."""

import math

from torch import Tensor

from dctlib.maps.base import DifferentiableMap, Product

# Forward and backward passes of one row. Forward-mode differentiation carries a tangent beside the value, which costs
# about a second forward pass. So a jvp counts as two passes, and a jvp of a jvp as four.
_PASSES: dict[Product, tuple[int, int]] = {
    "value": (1, 0),
    "value_and_vjp": (1, 1),
    "jvp": (2, 0),
    "second_derivative": (4, 0),
    "second_derivative_vjp": (2, 2),
}


class PassCounter(DifferentiableMap):
    """A map that counts the passes that its products take.

    A pass takes one vector through the slice, over all prompts.

    Attributes
    ----------
    forward, backward : int
        Passes counted. Set them to 0 to start again.
    """

    def __init__(self, cmap: DifferentiableMap):
        self.d_source, self.d_target = cmap.d_source, cmap.d_target
        self.source, self.target = cmap.source, cmap.target
        self.dtype, self.device = cmap.dtype, cmap.device
        self.chunk_size, self.scale = cmap.chunk_size, cmap.scale
        self.forward = 0
        self.backward = 0
        self._cmap = cmap

    def _product(self, name: Product, **rows: Tensor) -> Tensor:
        count = len(next(iter(rows.values())))
        if name == "vjp_at_zero":
            self.forward += math.ceil(count / self._cmap.chunk_size)  # the rows of a chunk share one
            self.backward += count
        else:
            forward, backward = _PASSES[name]
            self.forward += forward * count
            self.backward += backward * count
        return self._cmap._product(name, **rows)
