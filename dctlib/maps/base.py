"""Differentiable maps known by their products with vectors: value, jvp, vjp, second derivatives."""

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class DifferentiableMap(ABC):
    """A map Δ: R^{d_source} → R^{d_target} with Δ(0) = 0, known by its products with vectors.

    Every method takes a batch with one factor a row and works through it in chunks of `chunk_size` rows, so that
    memory depends on the chunk and not on the number of factors. Results are float32 (float64 for float64 maps).
    """

    d_source: int
    d_target: int
    dtype: torch.dtype
    device: torch.device
    chunk_size: int
    scale: float
    """A typical norm of what θ is added to: where a search for the input scale starts."""
    source: int | None = None
    target: int | None = None

    @abstractmethod
    def _terms(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """The functions (m, d_source) → (m, d_target) whose sum, less its value at 0, is Δ."""

    @abstractmethod
    def _clean(self) -> Tensor:
        """The sum of the terms at 0, (d_target,)."""

    def _running(self) -> AbstractContextManager[None]:
        return nullcontext()

    def __call__(self, theta: Float[Tensor, "m d_source"]) -> Float[Tensor, "m d_target"]:
        """Δ(θ_l) for every row."""

        def value(theta: Tensor) -> Tensor:
            return _sum(term(theta) for term in self._terms()) - self._clean()

        with torch.no_grad():
            return self._chunked(value, theta=theta)

    def value_and_vjp(
        self, theta: Float[Tensor, "m d_source"], cotangent: Float[Tensor, "m d_target"]
    ) -> tuple[Float[Tensor, "m d_target"], Float[Tensor, "m d_source"]]:
        """Δ(θ_l) and ∇_θ⟨u_l, Δ(θ_l)⟩ from one forward and one backward pass."""

        def both(theta: Tensor, cotangent: Tensor) -> Tensor:
            theta = theta.detach().requires_grad_()
            value, gradient = -self._clean().expand_as(cotangent), torch.zeros_like(theta)
            for term in self._terms():
                output = term(theta)
                value = value + output.detach()
                gradient += torch.autograd.grad(output, theta, cotangent)[0]
            return torch.cat([value, gradient], dim=1)

        with torch.enable_grad():
            joined = self._chunked(both, theta=theta, cotangent=cotangent)
        return joined[:, : self.d_target].contiguous(), joined[:, self.d_target :].contiguous()

    def vjp(
        self, theta: Float[Tensor, "m d_source"], cotangent: Float[Tensor, "m d_target"]
    ) -> Float[Tensor, "m d_source"]:
        """J(θ_l)ᵀ u_l."""
        return self.value_and_vjp(theta, cotangent)[1]

    def vjp_at_zero(self, cotangent: Float[Tensor, "m d_target"]) -> Float[Tensor, "m d_source"]:
        """T1ᵀ u_l: ``vjp`` at θ = 0, for less, as a chunk of rows shares one row's forward pass."""

        def pulled_back(cotangent: Tensor) -> Tensor:
            zero = torch.zeros(1, self.d_source, dtype=self.dtype, device=self.device, requires_grad=True)
            batch: Any = {"grad_outputs": cotangent[:, None], "is_grads_batched": True}
            return _sum(torch.autograd.grad(term(zero), zero, **batch)[0] for term in self._terms())[:, 0]

        # The backward pass of compiled blocks takes no batch of cotangents.
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            return self._chunked(pulled_back, cotangent=cotangent)

    def jvp(
        self, theta: Float[Tensor, "m d_source"], tangent: Float[Tensor, "m d_source"]
    ) -> Float[Tensor, "m d_target"]:
        """J(θ_l) v_l, by forward-mode differentiation."""
        return self._sum_over_terms(_dual, theta=theta, tangent=tangent)

    def second_derivative(
        self, v: Float[Tensor, "m d_source"], w: Float[Tensor, "m d_source"]
    ) -> Float[Tensor, "m d_target"]:
        """T2(·, v_l, w_l): the second derivative of Δ at 0 along v_l and w_l, a jvp of a jvp."""

        def twice(term: Callable[[Tensor], Tensor], v: Tensor, w: Tensor) -> Tensor:
            return _directional(lambda theta: _directional(term, theta, v), torch.zeros_like(w), w)

        return self._sum_over_terms(twice, v=v, tangent=w)

    def second_derivative_vjp(
        self, u: Float[Tensor, "m d_target"], v: Float[Tensor, "m d_source"]
    ) -> Float[Tensor, "m d_source"]:
        """T2(u_l, v_l, ·): the gradient at 0 of ⟨u_l, J(θ) v_l⟩, reverse over forward mode."""

        def reverse_over_forward(term: Callable, u: Tensor, v: Tensor) -> Tensor:
            pull_back = torch.func.vjp(lambda theta: _directional(term, theta, v), torch.zeros_like(v))[1]
            return pull_back(u)[0]

        return self._sum_over_terms(reverse_over_forward, cotangent=u, tangent=v)

    def _sum_over_terms(self, derivative: Callable[..., Tensor], **rows: Tensor) -> Tensor:
        def total(*rows: Tensor) -> Tensor:
            return _sum(derivative(term, *rows) for term in self._terms())

        # Compiled blocks have no forward mode.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), _WrittenOut():
            return self._chunked(total, **rows)

    def _chunked(self, function: Callable[..., Tensor], **rows: Tensor) -> Tensor:
        """Apply `function` to `chunk_size` rows at a time, after checking every argument's shape."""
        ready, counts = [], set()
        for name, value in rows.items():
            width = self.d_target if name == "cotangent" else self.d_source
            if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] != width or not len(value):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"got {name} of shape {got}, expected (m, {width}); one vector is vector[None]")
            ready.append(value.detach().to(self.device, self.dtype))
            counts.add(len(value))
        if len(counts) > 1:
            raise ValueError(f"got arguments of {sorted(counts)} rows, expected one row of each for every factor")
        done: list[Tensor] = []
        first = 0
        with self._running():
            while first < len(ready[0]):
                try:
                    part = function(*(value[first : first + self.chunk_size] for value in ready)).detach()
                except torch.OutOfMemoryError:
                    part = None  # and no longer a traceback, which would keep what did not fit
                if part is None:
                    self._halve_chunk(len(ready[0]) - first)
                else:
                    done.append(part)
                    first += len(part)
        return torch.cat(done)

    def _halve_chunk(self, rows: int) -> None:
        """After an out-of-memory error with `rows` to go, go on with smaller chunks, or say what to change."""
        tried = min(self.chunk_size, rows)
        if tried == 1:
            raise ValueError("not even one factor fits the device's memory: take fewer or shorter prompts, or bfloat16")
        self.chunk_size = tried // 2
        warnings.warn(f"out of memory: going on with chunks of {self.chunk_size} factors", stacklevel=5)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _dual(function: Callable[[Tensor], Tensor], theta: Tensor, tangent: Tensor) -> Tensor:
    """A directional derivative that cannot be nested, but inside which accelerate can fetch offloaded weights."""
    with forward_ad.dual_level():
        value, derivative = forward_ad.unpack_dual(function(forward_ad.make_dual(theta, tangent)))
        return torch.zeros_like(value) if derivative is None else derivative


def _directional(function: Callable[[Tensor], Tensor], theta: Tensor, tangent: Tensor) -> Tensor:
    return torch.func.jvp(function, (theta,), (tangent,))[1]


def gaussian(
    cmap: DifferentiableMap, rows: int, columns: int, generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """Normal numbers for products of `cmap`, drawn on the CPU, so that they are the same for every device."""
    return torch.randn(rows, columns, generator=generator, dtype=cmap.dtype).to(cmap.device)


def check_finite(rows: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """Return what a map gave, or raise ValueError if a number is NaN or infinite."""
    if not torch.isfinite(rows).all():
        raise ValueError("the map gave values that are not finite; try dtype='float32' or a smaller input scale")
    return rows


class _WrittenOut(TorchFunctionMode):
    """Replace fused functions by their definitions, so that they can be differentiated twice.

    Differentiating the forward-mode derivative of torch's layer norm once more, in either mode, gives wrong numbers
    without a word (by 13 to 48 % on GPT-2 and GPT-NeoX, torch 2.13); that of SiLU has no forward derivative.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _DEFINITIONS.get(func, func)(*args, **(kwargs or {}))


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return input * torch.sigmoid(input)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    output = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


_DEFINITIONS = {F.layer_norm: _layer_norm, F.silu: _silu}
