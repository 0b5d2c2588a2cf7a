"""The causal map that keeps prompts apart: the changes of n prompts side by side, in place of their mean."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from dctlib.causal_map import Capture, CausalMap, replay
from dctlib.store import key_of


class ConcatenatedMap(CausalMap):
    """Δ_concat(θ) = (Δ_1(θ), …, Δ_n(θ)) ∈ R^{n·d}, where Δ_i is the :class:`CausalMap` of prompt i alone.

    Averaging keeps what a direction does alike to all prompts; here what it does to each counts, for ‖Δ_concat‖² is the
    sum of ‖Δ_i‖², the objective of the original MELBO. Calibration and all fits run unchanged. Build it with
    :meth:`from_model`; the blocks of n rows of width d are in the order of the prompts, and their mean is Δ.

    V of a fit are steering vectors as ever. A row of U is n changes, one a prompt, and no direction of the residual
    stream: there is nothing to ablate.
    """

    def __init__(self, model: PreTrainedModel, captures: Sequence[Capture], **options: Any):
        super().__init__(model, captures, **options)
        self.d_target = len(self.tokens) * self.d_source

    @cached_property
    def digest(self) -> str:
        """A hash of all that the map depends on, this file included: what remembers fits knows CausalMap's alone."""
        return key_of({"averaged": super().digest}, ["concatenated_map"])

    def _terms(self) -> Sequence[Callable[[Tensor], Tensor]]:
        def term(captured: Capture, before: int) -> Callable[[Tensor], Tensor]:
            last, after = captured.last(self.positions), len(self.tokens) - before - len(captured.paths)

            def last_positions(theta: Tensor) -> Float[Tensor, "m n_d"]:
                hidden = replay(self._blocks, captured, theta)[:, last].to(self.dtype)
                each = hidden.unflatten(1, (-1, self.positions)).mean(2)  # (m, prompts of this capture, d)
                return F.pad(each.flatten(1), (before * self.d_source, after * self.d_source))

            return last_positions

        terms, before = [], 0
        for captured in self._captures:
            terms.append(term(captured, before))
            before += len(captured.paths)
        return terms
