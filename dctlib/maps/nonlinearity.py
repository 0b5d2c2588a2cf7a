"""The nonlinearity σ of a transcoder (equation 2)."""

from typing import Literal, get_args

import torch
from torch import Tensor

Activation = Literal["linear", "quadratic", "exponential"]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Return σ(x): x, x² or exp(x) − 1, or raise ValueError for another name."""
    match activation:
        case "linear":
            return x
        case "quadratic":
            return x.square()
        case "exponential":
            return torch.expm1(x)
    raise ValueError(f"got activation {activation!r}, expected one of {get_args(Activation)}")
