"""The contract of a map Δ: its value, its Jacobian products (T1) and its second derivatives (T2)."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Product = Literal["value", "value_and_vjp", "vjp_at_zero", "jvp", "second_derivative", "second_derivative_vjp"]

Source = Float[Tensor, "m d_source"]
"""A vector of the source layer for each factor: θ, v or w."""

Target = Float[Tensor, "m d_target"]
"""A vector of the target layer for each factor: Δ(θ) or u."""


class DifferentiableMap(ABC):
    """A map Δ: R^{d_source} → R^{d_target} with Δ(0) = 0, of which products with vectors are computed.

    Every product takes a batch with one row for each factor, and computes `chunk_size` rows at a time, so memory
    depends on the chunk and not on the number of factors. Results are float32, or float64 for a float64 map. A subclass
    implements one method, :meth:`_product`.

    Attributes
    ----------
    d_source, d_target : int
        Widths of its input θ and of its output.
    dtype, device : torch.dtype, torch.device
        Type and device of the results.
    chunk_size : int
        Rows computed at once. It changes cost, not results.
    scale : float
        A typical norm of what θ is added to, from which :func:`dctlib.calibrate` starts its search.
    source, target : int or None
        Layers s and t of a transformer slice; None for a plain function.
    """

    d_source: int
    d_target: int
    dtype: torch.dtype
    device: torch.device
    chunk_size: int
    scale: float
    source: int | None = None
    target: int | None = None

    @abstractmethod
    def _product(self, name: Product, **rows: Tensor) -> Tensor:
        """Compute the product of this name; ``value_and_vjp`` returns value and gradient side by side."""

    def __call__(self, theta: Source) -> Target:
        """Return Δ(θ_l) for every row."""
        return self._product("value", theta=theta)

    def value_and_vjp(self, theta: Source, cotangent: Target) -> tuple[Target, Source]:
        """Return Δ(θ_l) and ∇_θ⟨u_l, Δ(θ_l)⟩, from one forward and one backward pass."""
        joined = self._product("value_and_vjp", theta=theta, cotangent=cotangent)
        return joined[:, : self.d_target].contiguous(), joined[:, self.d_target :].contiguous()

    def vjp(self, theta: Source, cotangent: Target) -> Source:
        """Return J(θ_l)ᵀ u_l, where J is the Jacobian of Δ."""
        return self.value_and_vjp(theta, cotangent)[1]

    def vjp_at_zero(self, cotangent: Target) -> Source:
        """Return T1ᵀ u_l: ``vjp`` at θ = 0 at a lower cost, because a chunk of rows shares one forward pass."""
        return self._product("vjp_at_zero", cotangent=cotangent)

    def jvp(self, theta: Source, tangent: Source) -> Target:
        """Return J(θ_l) v_l; at θ = 0 that is T1 v_l."""
        return self._product("jvp", theta=theta, tangent=tangent)

    def second_derivative(self, v: Source, w: Source) -> Target:
        """Return T2(·, v_l, w_l): the second derivative of Δ at 0 along v_l and w_l."""
        return self._product("second_derivative", v=v, tangent=w)

    def second_derivative_vjp(self, u: Target, v: Source) -> Source:
        """Return T2(u_l, v_l, ·): the gradient at 0 of ⟨u_l, J(θ) v_l⟩."""
        return self._product("second_derivative_vjp", cotangent=u, tangent=v)

    def _chunked(self, function: Callable[..., Tensor], **rows: Tensor) -> Tensor:
        """Apply `function` to `chunk_size` rows at a time, after checking every argument's shape."""
        arguments = self._checked(**rows)
        if self.chunk_size < 1:
            raise ValueError(f"got chunk_size={self.chunk_size}, expected at least 1")
        total = len(arguments[0])
        results: list[Tensor] = []
        first = 0
        while first < total:
            try:
                result = function(*(rows[first : first + self.chunk_size] for rows in arguments)).detach()
            except torch.OutOfMemoryError:
                result = None  # halved outside `except`, whose traceback keeps the memory in use
            if result is None:
                self._halve_chunk(total - first)
            else:
                results.append(result)
                first += len(result)
        return torch.cat(results)

    def _checked(self, **rows: Tensor) -> list[Tensor]:
        """Return the arguments on the map's device, or raise ValueError naming a wrong shape."""
        for name, value in rows.items():
            width = self.d_target if name == "cotangent" else self.d_source
            if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] != width or not len(value):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"got {name} of shape {got}, expected (m, {width}); one vector is vector[None]")
        counts = sorted({len(value) for value in rows.values()})
        if len(counts) > 1:
            raise ValueError(f"got arguments of {counts} rows, expected one row of each for every factor")
        # Copies, because tensors of inference mode have no gradient, and a function may write to its argument.
        return [value.detach().to(self.device, self.dtype, copy=True) for value in rows.values()]

    def _halve_chunk(self, rows: int) -> None:
        """Halve the chunk after an out-of-memory error with `rows` rows left, or raise ValueError if it had one row."""
        tried = min(self.chunk_size, rows)
        if tried == 1:
            raise ValueError("one factor exceeds the device's memory; use fewer or shorter prompts, or bfloat16")
        self.chunk_size = tried // 2
        warnings.warn(f"out of memory: going on with chunks of {self.chunk_size} factors", stacklevel=5)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def gaussian(
    cmap: DifferentiableMap, rows: int, columns: int, generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """Return standard normal numbers of the map's type on its device, drawn on the CPU so that devices agree."""
    return torch.randn(rows, columns, generator=generator, dtype=cmap.dtype).to(cmap.device)


def check_finite(rows: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """Return `rows` of a map's results, or raise ValueError if a number is NaN or infinite."""
    if not torch.isfinite(rows).all():
        raise ValueError("the map gave values that are not finite; try dtype='float32' or a smaller input scale")
    return rows
