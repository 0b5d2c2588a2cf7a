"""The map of a plain torch function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dctlib.maps.autograd import AutogradMap, Term


class FunctionMap(AutogradMap):
    """The map Δ(θ) = function(θ) − function(0) of any differentiable torch function.

    Parameters
    ----------
    function : callable
        (m, d_source) → (m, d_target), row by row.
    d_source, d_target : int
        Widths of its input and output.
    dtype : torch.dtype, optional
        Type in which it computes. The default is torch's, or float64 if `function` raises RuntimeError in that.
    device : str or torch.device
        Where it computes.
    chunk_size : int
        Rows given to `function` at once.

    Raises
    ------
    ValueError
        If `function` returns another shape than (1, d_target) for one row.
    """

    def __init__(
        self,
        function: Term,
        *,
        d_source: int,
        d_target: int,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        chunk_size: int = 1024,
    ):
        self.d_source, self.d_target = d_source, d_target
        self.device = torch.device(device)
        self.chunk_size = chunk_size
        self.scale = 1.0
        self._function = function
        self.dtype = dtype or torch.get_default_dtype()
        try:
            clean = self._evaluate_at_zero()
        except RuntimeError:
            if dtype:
                raise
            self.dtype = torch.float64
            clean = self._evaluate_at_zero()
        if clean.shape != (1, d_target):
            raise ValueError(f"function gave shape {tuple(clean.shape)} for one row, expected (1, {d_target})")
        self._at_zero = clean[0]

    @torch.no_grad()
    def _evaluate_at_zero(self) -> Tensor:
        return self._function(torch.zeros(1, self.d_source, dtype=self.dtype, device=self.device))

    def _terms(self) -> Sequence[Term]:
        return [self._function]

    def _clean(self) -> Tensor:
        return self._at_zero
