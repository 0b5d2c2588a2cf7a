"""Products of a map given as torch functions: reverse mode for vjps, forward mode for jvps, both for T2."""

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dctlib.maps.base import DifferentiableMap, Product

Term = Callable[[Tensor], Tensor]
"""A differentiable function, (m, d_source) → (m, d_target), row by row."""


class AutogradMap(DifferentiableMap):
    """A map Δ(θ) = Σ_i [f_i(θ) − f_i(0)] of torch functions f_i, the terms, which are differentiated by autograd.

    A causal map has one term for each packed group of prompts, a plain function has one.
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
        with self._context():
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
                case "jvp":
                    return self._forward_mode(_jvp, **rows)
                case "second_derivative":
                    return self._forward_mode(_jvp_of_jvp, **rows)
                case "second_derivative_vjp":
                    return self._forward_mode(_vjp_of_jvp, **rows)

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
        zero = torch.zeros(1, self.d_source, dtype=self.dtype, device=self.device, requires_grad=True)
        batch: Any = {"grad_outputs": cotangent[:, None], "is_grads_batched": True}
        return _sum(torch.autograd.grad(term(zero), zero, **batch)[0] for term in self._terms())[:, 0]

    def _forward_mode(self, derivative: Callable[..., Tensor], **rows: Tensor) -> Tensor:
        def total(*rows: Tensor) -> Tensor:
            return _sum(derivative(term, *rows) for term in self._terms())

        # Compiled blocks have no forward mode.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), _Unfused():
            return self._chunked(total, **rows)


def _jvp(term: Term, theta: Tensor, tangent: Tensor) -> Tensor:
    """J(θ) v, not to be nested; inside a dual level accelerate can fetch offloaded weights, in `torch.func` not."""
    with forward_ad.dual_level():
        value, derivative = forward_ad.unpack_dual(term(forward_ad.make_dual(theta, tangent)))
        return torch.zeros_like(value) if derivative is None else derivative


def _jvp_of_jvp(term: Term, v: Tensor, w: Tensor) -> Tensor:
    """T2(·, v, w): differentiate along w, at 0, the derivative along v."""
    return _directional(lambda theta: _directional(term, theta, v), torch.zeros_like(w), w)


def _vjp_of_jvp(term: Term, u: Tensor, v: Tensor) -> Tensor:
    """T2(u, v, ·): pull u back, at 0, through the derivative along v; reverse over forward mode."""
    pull_back = torch.func.vjp(lambda theta: _directional(term, theta, v), torch.zeros_like(v))[1]
    return pull_back(u)[0]


def _directional(function: Term, theta: Tensor, tangent: Tensor) -> Tensor:
    return torch.func.jvp(function, (theta,), (tangent,))[1]


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


class _Unfused(TorchFunctionMode):
    """Replace fused functions by their definitions, because those can be differentiated twice.

    Differentiating the forward-mode derivative of torch's layer norm once more, in either mode, gives wrong numbers
    without an error (by 13 to 48 % on GPT-2 and GPT-NeoX, torch 2.13). That of SiLU has no forward derivative.
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
