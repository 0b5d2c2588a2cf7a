"""Products of a map that consists of torch functions: vjps in reverse mode, jvps in forward mode, T2 in both."""

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dctlib.maps.base import DifferentiableMap, Product
from dctlib.models.blocks import tolerance

Term = Callable[[Tensor], Tensor]
"""A differentiable function, (m, d_source) → (m, d_target), row by row."""


class AutogradMap(DifferentiableMap):
    """A map Δ(θ) = Σ_i [f_i(θ) − f_i(0)] whose terms f_i are torch functions, differentiated by autograd.

    A causal map has one term for each packed group of prompts. A plain function has a single term.
    """

    @abstractmethod
    def _terms(self) -> Sequence[Term]:
        """Return the functions f_i."""

    @abstractmethod
    def _clean(self) -> Tensor:
        """Return Σ_i f_i(0), (d_target,)."""

    def _context(self) -> AbstractContextManager[None]:
        """Return the context inside which terms can be called."""
        return nullcontext()

    def _product(self, name: Product, **rows: Tensor) -> Tensor:
        try:
            return self._compute(name, **rows)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            if name == "value":
                raise
            raise ValueError(
                f"this map cannot be differentiated ({error}); if its weights are quantised, load the model in bfloat16"
            ) from error

    @torch.inference_mode(False)  # in which every derivative would be 0
    def _compute(self, name: Product, **rows: Tensor) -> Tensor:
        with self._context():
            if name != "value" and not self._has_gradient:
                raise ValueError(
                    "gradients of this map are not its slopes, as with quantised layers that pass no gradient on; load "
                    "the model in bfloat16"
                )
            match name:
                case "value":
                    with torch.no_grad():
                        return self._chunked(self._value, **rows)
                case "value_and_vjp":
                    with torch.enable_grad():
                        return self._chunked(self._value_and_vjp, **rows)
                case "vjp_at_zero":
                    # The backward pass of compiled blocks takes no batch of cotangents.
                    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                        return self._chunked(self._vjp_at_zero, **rows)
                case _:
                    # Compiled blocks have no forward mode.
                    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _Unfused():
                        derivative = self._derivative(name)
                        return self._chunked(lambda *rows: _sum(derivative(f, *rows) for f in self._terms()), **rows)

    def _value(self, theta: Tensor) -> Tensor:
        return _sum(term(theta) for term in self._terms()) - self._clean()

    def _value_and_vjp(self, theta: Tensor, cotangent: Tensor) -> Tensor:
        theta = theta.detach().requires_grad_()
        value = -self._clean().expand_as(cotangent)
        gradient = torch.zeros_like(theta)
        for term in self._terms():  # one graph at a time
            output = term(theta)
            value = value + output.detach()
            gradient += torch.autograd.grad(output, theta, cotangent)[0]
        return torch.cat([value, gradient], dim=1)

    def _vjp_at_zero(self, cotangent: Tensor) -> Tensor:
        if not self._batches_backward:
            zeros = cotangent.new_zeros(len(cotangent), self.d_source)
            return self._value_and_vjp(zeros, cotangent)[:, self.d_target :]
        zero = torch.zeros(1, self.d_source, dtype=self.dtype, device=self.device, requires_grad=True)
        batch: Any = {"grad_outputs": cotangent[:, None], "is_grads_batched": True}
        return _sum(torch.autograd.grad(term(zero), zero, **batch)[0] for term in self._terms())[:, 0]

    @cached_property
    def _has_gradient(self) -> bool:
        """Whether the gradient at 0 agrees with a central difference along at least one of three random directions.

        Some quantised layers pass no gradient on and raise no error. One direction is enough, because mixtures of
        experts are discontinuous in places. A gradient that is not finite passes, because its user reports it.
        """
        term = next(iter(self._terms()))
        generator = torch.Generator().manual_seed(0)
        step = self.scale * (1e-3 if torch.finfo(self._precision).bits >= 32 else 0.05)
        for _ in range(3):
            v = F.normalize(torch.randn(1, self.d_source, generator=generator, dtype=self.dtype), dim=1).to(self.device)
            with torch.no_grad():
                slope = (term(step * v) - term(-step * v)) / (2 * step)
            with torch.enable_grad():
                theta = torch.zeros_like(v, requires_grad=True)
                gradient = torch.autograd.grad(term(theta), theta, F.normalize(slope, dim=1))[0]
            near = abs((gradient * v).sum() - slope.norm()) <= 0.2 * slope.norm()
            if near or not gradient.isfinite().all():
                return True
        return False

    @cached_property
    def _batches_backward(self) -> bool:
        """Whether one backward pass takes a batch of cotangents; some operations, such as in-place writes, refuse."""
        zero = torch.zeros(1, self.d_source, dtype=self.dtype, device=self.device, requires_grad=True)
        cotangent = torch.ones(2, 1, self.d_target, dtype=self.dtype, device=self.device)
        try:
            torch.autograd.grad(next(iter(self._terms()))(zero), zero, cotangent, is_grads_batched=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
        return True

    def _derivative(self, name: Product) -> Callable[..., Tensor]:
        """Return the function that computes a product: in forward mode where that is right, else in reverse mode.

        Forward mode refuses some torch functions, and gives wrong second derivatives of others without an error. So
        the two modes are compared once, on random vectors.

        Raises
        ------
        ValueError
            If neither mode can be used.
        """
        if name in self._derivatives:
            return self._derivatives[name]
        forward, reverse = _DERIVATIVES[name]
        widths = [self.d_target if name == "second_derivative_vjp" else self.d_source, self.d_source]
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randn(2, d, generator=generator, dtype=self.dtype).to(self.device) for d in widths]
        term = next(iter(self._terms()))
        try:
            expected = reverse(term, *rows)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"this map's {name} cannot be computed, because its functions cannot be differentiated twice "
                f"({error}); load the model without quantised weights or custom kernels"
            ) from error
        try:
            most = min(10 * tolerance(self._precision), 0.1)  # the known faults are 13 % and more
            wrong = (forward(term, *rows) - expected).norm() > most * expected.norm() + 1e-9
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError):
            wrong = True
        self._derivatives[name] = reverse if wrong else forward
        return self._derivatives[name]

    @cached_property
    def _derivatives(self) -> dict[Product, Callable[..., Tensor]]:
        return {}

    @property
    def _precision(self) -> torch.dtype:
        """The type in which terms compute, which may be narrower than that of the results."""
        return self.dtype


def _jvp(term: Term, theta: Tensor, tangent: Tensor) -> Tensor:
    """Return J(θ) v; it cannot be nested. Unlike `torch.func`, it lets accelerate fetch offloaded weights."""
    with forward_ad.dual_level():
        value, derivative = forward_ad.unpack_dual(term(forward_ad.make_dual(theta, tangent)))
        return torch.zeros_like(value) if derivative is None else derivative


def _jvp_of_jvp(term: Term, v: Tensor, w: Tensor) -> Tensor:
    """Return T2(·, v, w): the derivative along w, at 0, of the derivative along v."""
    return _directional(lambda theta: _directional(term, theta, v), torch.zeros_like(w), w)


def _vjp_of_jvp(term: Term, u: Tensor, v: Tensor) -> Tensor:
    """Return T2(u, v, ·): u pulled back, at 0, through the derivative along v (reverse over forward mode)."""
    pull_back = torch.func.vjp(lambda theta: _directional(term, theta, v), torch.zeros_like(v))[1]
    return pull_back(u)[0]


def _jvp_by_vjps(term: Term, theta: Tensor, v: Tensor) -> Tensor:
    """Return J(θ) v in reverse mode alone: the gradient in u of ⟨J(θ)ᵀ u, v⟩, which is linear in u."""
    with torch.enable_grad():
        theta = theta.detach().requires_grad_()
        value = term(theta)
        u = torch.zeros_like(value, requires_grad=True)
        pulled_back = torch.autograd.grad(value, theta, u, create_graph=True)[0]
        return torch.autograd.grad(pulled_back, u, v)[0]


def _vjp_of_vjp(term: Term, u: Tensor, v: Tensor) -> Tensor:
    """Return T2(u, v, ·) in reverse mode alone."""
    with torch.enable_grad():
        return _pull_back_twice(term, u, v).detach()


def _jvp_of_jvp_by_vjps(term: Term, v: Tensor, w: Tensor) -> Tensor:
    """Return T2(·, v, w) in reverse mode alone: the gradient in u of ⟨T2(u, v, ·), w⟩, which is linear in u."""
    with torch.enable_grad():
        with torch.no_grad():
            u = torch.zeros_like(term(v))
        second = _pull_back_twice(term, u.requires_grad_(), v)
        return torch.autograd.grad(second, u, w)[0] if second.requires_grad else torch.zeros_like(u)


def _pull_back_twice(term: Term, u: Tensor, v: Tensor) -> Tensor:
    theta = torch.zeros_like(v, requires_grad=True)
    first = torch.autograd.grad(term(theta), theta, u, create_graph=True)[0]
    if not first.requires_grad:  # the map is linear
        return torch.zeros_like(v)
    second = torch.autograd.grad(first, theta, v, create_graph=True, allow_unused=True)[0]
    return torch.zeros_like(v) if second is None else second


def _directional(function: Term, theta: Tensor, tangent: Tensor) -> Tensor:
    return torch.func.jvp(function, (theta,), (tangent,))[1]


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


_DERIVATIVES: dict[Product, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "jvp": (_jvp, _jvp_by_vjps),
    "second_derivative": (_jvp_of_jvp, _jvp_of_jvp_by_vjps),
    "second_derivative_vjp": (_vjp_of_jvp, _vjp_of_vjp),
}
"""For each product, its function in forward mode and its function in reverse mode alone."""


class _Unfused(TorchFunctionMode):
    """Replace fused functions by their definitions, which can be differentiated twice.

    If the forward-mode derivative of torch's layer norm is differentiated again, in either mode, the result is wrong
    without an error (by 13 to 48 % on GPT-2 and GPT-NeoX, torch 2.13). The derivative of SiLU has no forward mode.
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
    cudnn_enable: bool = True,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    output = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    output = input * torch.rsqrt(input.square().mean(dims, keepdim=True) + eps)
    return output if weight is None else output * weight


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


_DEFINITIONS = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.scaled_dot_product_attention: _attention,
    F.silu: _silu,
}
