"""The causal map Δ(θ): add θ to the residual stream at a source layer, measure the change at a target layer."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from accelerate.utils import has_offloaded_params, send_to_device
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.maps.base import DifferentiableMap
from dctlib.maps.replay import Capture, capture, replay
from dctlib.models.blocks import check_layer, eager_attention, get_blocks, residual_width
from dctlib.models.chat import tokenize_each
from dctlib.models.fingerprint import model_digest
from dctlib.models.packing import pack_prompts

# Floating-point numbers that one factor's forward and backward pass keeps of each block: for each token, in units of
# the model width, and for each pair of tokens and head, as attention is eager. Measured on Llama-shaped blocks; only
# the chunk size depends on it.
_KEPT_PER_TOKEN = 40

_KEPT_PER_PAIR = 3

_CPU_CHUNK_BYTES = 320 * 2**20


class CausalMap(DifferentiableMap):
    """Δ(θ) of a transformer slice: mean over prompts and over the last positions of h_t(θ) − h_t(0).

    Build it with :meth:`from_model`. Blocks source … target−1 are run again on what one pass over the prompts left at
    their door, so each product costs (target − source) / (number of blocks) of a full pass, and it is exact. What
    prompts share at their beginning, as a chat template, is run once for all of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        captures: Sequence[Capture],
        *,
        source: int,
        target: int,
        positions: int,
        chunk_size: int | None,
        memory: float | None,
        compiled: bool,
        device: str | torch.device | None = None,
    ):
        self.source, self.target, self.positions = source, target, positions
        self.d_source = self.d_target = residual_width(model)
        self.tokens = [len(path) for captured in captures for path in captured.paths]
        blocks: list[Any] = list(get_blocks(model)[source:target])
        if device is not None:
            if any(has_offloaded_params(module) for block in blocks for module in block.modules()):
                raise ValueError(
                    f"got device={device!r} and offloaded blocks, expected a model loaded whole, as on 'cpu'"
                )
            blocks = [copy.deepcopy(block).to(device) for block in blocks]
            captures = [replace(captured, **send_to_device(vars(captured), device)) for captured in captures]
        self.device = captures[0].hidden.device
        self.dtype = torch.float64 if captures[0].hidden.dtype == torch.float64 else torch.float32
        self.scale = torch.cat([c.hidden[0] for c in captures]).to(self.dtype).norm(dim=1).median().item()
        heads = model.config.get_text_config().num_attention_heads
        self.chunk_size = chunk_size or _chunk_size(self, captures, heads, memory)
        self._model, self._captures = model, captures
        self._blocks: list[Any] = [torch.compile(block) for block in blocks] if compiled else blocks
        with torch.no_grad(), self._running():
            zero = torch.zeros(1, self.d_source, dtype=self.dtype, device=self.device)
            self._at_zero = torch.stack([term(zero)[0] for term in self._terms()]).sum(0)
        if not torch.isfinite(self._at_zero).all():
            raise ValueError(f"the model's activations at layer {target} are not finite; try dtype='float32'")

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        *,
        source: int,
        target: int,
        positions: int = 3,
        chunk_size: int | None = None,
        memory: float | None = None,
        compiled: bool = False,
        device: str | torch.device | None = None,
    ) -> "CausalMap":
        """Capture `texts` and return their causal map from layer `source` to layer `target`.

        Parameters
        ----------
        texts : sequence of str
            Whole prompts (see :func:`dctlib.format_chat`). None is padded, and none sees another.
        source, target : int
            Layers as in Hugging Face's ``hidden_states``: h_s is the input of block s. ``target`` may be the number
            of blocks: the last block's output before the final norm.
        positions : int
            The change is averaged over the last `positions` tokens of every prompt.
        chunk_size : int, optional
            Factors that are replayed at once; chosen by `memory` if left out. It changes cost, not results.
        memory : float, optional
            GiB that a chunk's forward and backward pass may take, besides the model; left out, a quarter of what is
            free on a GPU, and 320 MiB on a CPU, whose caches like small chunks. A GPU that runs out all the same
            goes on with half the chunk.
        compiled : bool
            Let torch.compile fuse what lies between a block's products. On a GPU it pays from some three hundred
            passes on: the first takes half a minute, those after it 0.7 of the time. It changes cost, not results;
            forward-mode products are not compiled.
        device : str or torch.device, optional
            Where copies of the slice's blocks go, and all products are computed, while the model stays where it is:
            for a GPU that holds the slice and not the model, which is then loaded with ``device="cpu"``. What is done
            to the model later, as by :func:`dctlib.steer`, does not reach the copies. Left out, the model's own blocks.

        Raises
        ------
        ValueError
            If the layers are out of range or out of order, there is no text, a text has fewer tokens than
            `positions`, the activations are not finite, or `device` is given and blocks are offloaded.
        """
        count = len(get_blocks(model))
        source = check_layer(model, source, name="source")
        if not isinstance(target, Integral) or not source < target <= count:
            raise ValueError(f"got source={source}, target={target!r}, expected source < target <= {count}")
        target = int(target)
        if positions < 1 or (chunk_size is not None and chunk_size < 1) or (memory is not None and memory <= 0):
            raise ValueError(
                f"got positions={positions}, chunk_size={chunk_size}, memory={memory}, expected at least 1, at "
                f"least 1 and above 0"
            )
        tokens = [row.to(model.device) for row in tokenize_each(tokenizer, texts)]
        for text, row in zip(texts, tokens, strict=True):
            if row.shape[1] < positions:
                raise ValueError(f"prompt {text!r} has {row.shape[1]} tokens, fewer than positions={positions}")
        with eager_attention(model):
            captures = [capture(model, tree, source=source, target=target) for tree in pack_prompts(model, tokens)]
        options: dict[str, Any] = {"positions": positions, "chunk_size": chunk_size, "memory": memory}
        options |= {"compiled": compiled, "device": device}
        with eager_attention(model):  # copies of blocks stay as they are here
            return cls(model, captures, source=source, target=target, **options)

    @cached_property
    def digest(self) -> str:
        """A hash of all that the map depends on: weights, configuration, the prompts' tokens, slice and positions.

        Not residuals, whose last bits depend on the number of threads; nor hooks, so do not remember a fit that was
        made under :func:`dctlib.steer` or :func:`dctlib.ablate`.
        """
        digest = hashlib.sha256(f"{model_digest(self._model)} {self.source} {self.target} {self.positions}".encode())
        for captured in self._captures:
            digest.update(str([captured.tokens[0, path].tolist() for path in captured.paths]).encode())
        return digest.hexdigest()

    def second_derivative(self, v: Tensor, w: Tensor) -> Tensor:
        self._check_nothing_is_offloaded()
        return super().second_derivative(v, w)

    def second_derivative_vjp(self, u: Tensor, v: Tensor) -> Tensor:
        self._check_nothing_is_offloaded()
        return super().second_derivative_vjp(u, v)

    def _check_nothing_is_offloaded(self) -> None:
        if any(has_offloaded_params(module) for block in self._blocks for module in block.modules()):
            raise ValueError(
                "the slice's blocks are offloaded in part, and second derivatives (quadratic fits) cannot fetch "
                "weights; free device memory, or fit exponential or linear factors"
            )

    def _terms(self) -> Sequence[Callable[[Tensor], Tensor]]:
        def term(captured: Capture) -> Callable[[Tensor], Tensor]:
            last = captured.last(self.positions)

            def last_positions(theta: Tensor) -> Tensor:
                hidden = replay(self._blocks, captured, theta)[:, last]
                return hidden.to(self.dtype).sum(1) / (len(self.tokens) * self.positions)

            return last_positions

        return [term(captured) for captured in self._captures]

    def _clean(self) -> Tensor:
        return self._at_zero

    @contextmanager
    def _running(self) -> Iterator[None]:
        with eager_attention(self._model):
            yield


def _chunk_size(cmap: CausalMap, captures: Sequence[Capture], heads: int, memory: float | None) -> int:
    """Rows whose forward and backward pass take at most `memory` GiB, or what a device has for them."""
    tokens = max(captured.hidden.shape[1] for captured in captures)
    kept = tokens * (_KEPT_PER_TOKEN * cmap.d_source + _KEPT_PER_PAIR * heads * tokens)
    a_row = kept * len(captures[0].calls) * captures[0].hidden.element_size()
    if memory is not None:
        budget = memory * 2**30
    elif cmap.device.type == "cuda":
        budget = torch.cuda.mem_get_info(cmap.device)[0] / 4
    else:
        budget = _CPU_CHUNK_BYTES
    return max(1, int(budget / a_row))


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
        """A hash of all that the map depends on; it differs from that of the averaged map."""
        return hashlib.sha256(f"concatenated {super().digest}".encode()).hexdigest()

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
