"""The nonlinearity σ of a transcoder."""

from typing import Literal, get_args

import torch
from torch import Tensor

Activation = Literal["linear", "quadratic", "exponential"]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """σ(x): x, x² or exp(x) − 1."""
    match activation:
        case "linear":
            return x
        case "quadratic":
            return x.square()
        case "exponential":
            return torch.expm1(x)
    raise ValueError(f"got activation {activation!r}, expected one of {get_args(Activation)}")
