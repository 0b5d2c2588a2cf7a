"""The result of a fit: a shallow MLP Δ̂(θ) = Σ_l α_l σ(⟨v_l, θ⟩) u_l (equation 2)."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dctlib._io import atomic_path
from dctlib.maps.nonlinearity import Activation, activate

_TENSORS = ("U", "V", "alpha", "objective", "change", "importance")

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Facts(BaseModel):
    """The metadata of a file, beside its tensors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    activation: Activation
    input_scale: float
    source: int | None
    target: int | None
    seconds: float


@dataclass(frozen=True, eq=False)
class Transcoder:
    """A deep causal transcoder. Factors are rows, so U and V are the post's matrices transposed.

    Attributes
    ----------
    U : Tensor, (m, d_target)
        Unit output directions: what each factor writes at the target layer. Ablate these.
    V : Tensor, (m, d_source)
        Unit input directions. Steer with ``input_scale * V[l]`` at layer `source`: :meth:`steering_vectors`.
    alpha : Tensor, (m,)
        Weights.
    activation : {"linear", "quadratic", "exponential"}
        σ.
    input_scale : float
        R: the transcoder approximates Δ(Rθ). 1 for linear and quadratic fits, which need no scale.
    source, target : int or None
        The slice it was fitted on; None for a plain function.
    objective : Tensor, (iterations,)
        Causal importance Σ_l ⟨u_l, Δ_R(v_l)⟩ at the start of each iteration (equation 10 and Figure 2), or
        Σ_l T2(u_l, v_l, v_l) of a quadratic fit (equation 8). Empty for linear fits.
    change : Tensor, (iterations,)
        Root-mean-square distance that a row of V moved in each iteration.
    seconds : float
        Duration of the fit.
    importance : Tensor, (iterations, m), or None
        `objective` factor by factor: column l is factor l. None for a file written before it was recorded.

    Raises
    ------
    ValueError
        If shapes do not belong together, a tensor is not floating point or not finite, or σ is unknown.
    """

    U: Float[Tensor, "m d_target"]
    V: Float[Tensor, "m d_source"]
    alpha: Float[Tensor, " m"]
    activation: Activation
    input_scale: float
    source: int | None
    target: int | None
    objective: Float[Tensor, " iterations"]
    change: Float[Tensor, " iterations"]
    seconds: float
    importance: Float[Tensor, "iterations m"] | None = None

    def __post_init__(self) -> None:
        m = len(self.V)
        if self.U.ndim != 2 or self.V.ndim != 2 or len(self.U) != m or self.alpha.shape != (m,):
            shapes = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in ("U", "V", "alpha"))
            raise ValueError(f"got {shapes}, expected (m, d_target), (m, d_source) and (m,) with one m")
        if self.objective.ndim != 1 or self.change.ndim != 1:
            shapes = tuple(self.objective.shape), tuple(self.change.shape)
            raise ValueError(f"got objective and change of shapes {shapes}, expected a row each, (iterations,)")
        if self.importance is not None and self.importance.shape != (len(self.objective), m):
            shape = tuple(self.importance.shape)
            raise ValueError(f"got importance of shape {shape}, expected (iterations, m), {(len(self.objective), m)}")
        for name, tensor in self._tensors().items():
            if tensor.dtype not in _DTYPES:
                raise ValueError(f"got {name} of {tensor.dtype}, expected one of {_DTYPES}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} is not finite; refit in float32 or with a smaller input scale")
        if self.activation not in get_args(Activation):
            raise ValueError(f"got activation {self.activation!r}, expected one of {get_args(Activation)}")

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name in _TENSORS if (tensor := getattr(self, name)) is not None}

    def __len__(self) -> int:
        return len(self.V)

    def __call__(self, theta: Float[Tensor, "n d_source"]) -> Float[Tensor, "n d_target"]:
        """Return Δ̂(θ), the approximation of Δ(Rθ) (equation 2).

        Raises
        ------
        ValueError
            If θ has another shape.
        """
        if theta.ndim != 2 or theta.shape[1] != self.V.shape[1]:
            raise ValueError(
                f"got theta of shape {tuple(theta.shape)}, expected (n, {self.V.shape[1]}); one vector is theta[None]"
            )
        theta = theta.to(self.V)  # any type and device will do, as for the map
        return (activate(theta @ self.V.T, self.activation) * self.alpha) @ self.U

    def steering_vectors(self, norm: float | None = None) -> Float[Tensor, "k d_source"]:
        """Return vectors to add at layer `source`, on the CPU: rows of V at length `norm`, by default `input_scale`.

        An exponential fit gives k = m vectors. Linear and quadratic fits leave the sign of v open, so they give both
        signs, k = 2m. `norm` is in the units of the residual stream; for these fits use R of :func:`dctlib.calibrate`.
        """
        signed = self if self.activation == "exponential" else self.with_negations()
        return (self.input_scale if norm is None else norm) * signed.V.cpu()

    def with_negations(self) -> "Transcoder":
        """Return the same function with every factor beside its negation: 2m factors of half the weight.

        Linear and quadratic fits leave the sign of v open, so both signs are steering vectors worth ranking.

        Raises
        ------
        ValueError
            If the fit is exponential: the negation of its factor is another function.
        """
        if self.activation == "exponential":
            raise ValueError(
                "exponential factors have a sign: the negation of one is not a factor of this transcoder; "
                "steering_vectors() gives its m vectors"
            )
        mirrored = -self.U if self.activation == "linear" else self.U
        importance = None if self.importance is None else torch.cat([self.importance, self.importance], dim=1) / 2
        return replace(
            self,
            U=torch.cat([self.U, mirrored]),
            V=torch.cat([self.V, -self.V]),
            alpha=torch.cat([self.alpha, self.alpha]) / 2,
            importance=importance,
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        copies = {"memory_format": torch.contiguous_format}  # safetensors refuses tensors that share memory
        tensors = {name: tensor.detach().cpu().clone(**copies) for name, tensor in self._tensors().items()}
        facts = {name: getattr(self, name) for name in ("activation", "input_scale", "source", "target", "seconds")}
        with atomic_path(path) as partial:
            save_file(tensors, partial, metadata={"transcoder": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> "Transcoder":
        """Return the transcoder that :meth:`save` wrote, bit for bit.

        Raises
        ------
        ValueError
            If the file is missing, truncated, or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                facts = _Facts.model_validate_json((file.metadata() or {})["transcoder"])
            found = cls(**tensors, **facts.model_dump())
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a whole transcoder file ({error}); fit and save it again") from error
        if not torch.isfinite(found.steering_vectors()).all():
            raise ValueError(f"{path} is damaged: V times input_scale is not finite; fit and save it again")
        return found
