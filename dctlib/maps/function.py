"""A map given as a torch function."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dctlib.maps.base import DifferentiableMap


class FunctionMap(DifferentiableMap):
    """Δ(θ) = function(θ) − function(0) for any differentiable torch function.

    Parameters
    ----------
    function : callable
        (m, d_source) → (m, d_target), row by row.
    d_source, d_target : int
        Widths of its input and output.
    dtype : torch.dtype, optional
        What it computes in. Left out, torch's default, or float64 for a function that takes no other.
    chunk_size : int
        Rows given to `function` at once.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        *,
        d_source: int,
        d_target: int,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        chunk_size: int = 1024,
    ):
        self.d_source, self.d_target = d_source, d_target
        self.device, self.chunk_size, self.scale = torch.device(device), chunk_size, 1.0
        self._function = function
        with torch.no_grad():
            self.dtype = dtype or torch.get_default_dtype()
            try:
                clean = function(torch.zeros(1, d_source, dtype=self.dtype, device=device))
            except RuntimeError:
                if dtype:
                    raise
                self.dtype = torch.float64
                clean = function(torch.zeros(1, d_source, dtype=self.dtype, device=device))
        if clean.shape != (1, d_target):
            raise ValueError(f"function gave shape {tuple(clean.shape)} for one row, expected (1, {d_target})")
        self._at_zero = clean[0]

    def _terms(self) -> Sequence[Callable[[Tensor], Tensor]]:
        return [self._function]

    def _clean(self) -> Tensor:
        return self._at_zero
