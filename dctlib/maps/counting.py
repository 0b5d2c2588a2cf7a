"""Counting forward and backward passes, so that methods can be compared at equal budgets."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from jaxtyping import Float
from torch import Tensor

from dctlib.maps.base import DifferentiableMap


class PassCounter(DifferentiableMap):
    """The same map, and the passes that its products have taken so far.

    A pass is one vector's way through the slice, over all prompts. Forward-mode differentiation carries a tangent
    beside the value, which is work like that of a second forward pass, so a jvp counts two, and a jvp of a jvp four.

    Attributes
    ----------
    forward, backward : int
        What has been counted. Set them to 0 to start again.
    """

    def __init__(self, cmap: DifferentiableMap):
        self.d_source, self.d_target, self.source, self.target = cmap.d_source, cmap.d_target, cmap.source, cmap.target
        self.dtype, self.device, self.chunk_size, self.scale = cmap.dtype, cmap.device, cmap.chunk_size, cmap.scale
        self.forward = self.backward = 0
        self._cmap = cmap

    def __call__(self, theta: Float[Tensor, "m d_source"]) -> Float[Tensor, "m d_target"]:
        self.forward += len(theta)
        return super().__call__(theta)

    def value_and_vjp(
        self, theta: Float[Tensor, "m d_source"], cotangent: Float[Tensor, "m d_target"]
    ) -> tuple[Float[Tensor, "m d_target"], Float[Tensor, "m d_source"]]:
        self.forward += len(theta)
        self.backward += len(theta)
        return super().value_and_vjp(theta, cotangent)

    def vjp_at_zero(self, cotangent: Float[Tensor, "m d_target"]) -> Float[Tensor, "m d_source"]:
        self.forward += math.ceil(len(cotangent) / self.chunk_size)  # a chunk shares one
        self.backward += len(cotangent)
        return super().vjp_at_zero(cotangent)

    def jvp(
        self, theta: Float[Tensor, "m d_source"], tangent: Float[Tensor, "m d_source"]
    ) -> Float[Tensor, "m d_target"]:
        self.forward += 2 * len(theta)
        return super().jvp(theta, tangent)

    def second_derivative(
        self, v: Float[Tensor, "m d_source"], w: Float[Tensor, "m d_source"]
    ) -> Float[Tensor, "m d_target"]:
        self.forward += 4 * len(v)
        return super().second_derivative(v, w)

    def second_derivative_vjp(
        self, u: Float[Tensor, "m d_target"], v: Float[Tensor, "m d_source"]
    ) -> Float[Tensor, "m d_source"]:
        self.forward += 2 * len(v)
        self.backward += 2 * len(v)
        return super().second_derivative_vjp(u, v)

    def _terms(self) -> Sequence[Callable[[Tensor], Tensor]]:
        return self._cmap._terms()

    def _clean(self) -> Tensor:
        return self._cmap._clean()

    def _running(self) -> AbstractContextManager[None]:
        return self._cmap._running()
