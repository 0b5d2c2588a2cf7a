"""The causal map Δ(θ): add θ to the residual stream at a source layer, measure the change at a target layer."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from accelerate.utils import has_offloaded_params, send_to_device
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.differentiable_map import DifferentiableMap
from dctlib.models import blocks_of, check_layer, model_digest, replaying, width_of
from dctlib.prompt_tree import PromptTree, plant
from dctlib.prompts import tokenize_each

# Floating-point numbers that one factor's forward and backward pass keeps of each block: for each token, in units of
# the model width, and for each pair of tokens and head, as attention is eager. Measured on Llama-shaped blocks; only
# the chunk size depends on it.
_KEPT_PER_TOKEN = 40
_KEPT_PER_PAIR = 3
_CPU_CHUNK_BYTES = 320 * 2**20


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


@dataclass(frozen=True)
class Capture:
    """A run of some prompts: what is needed to replay a slice of blocks.

    Attributes
    ----------
    tokens : Tensor, (1, tokens)
        Their ids; what some prompts share is there once.
    paths : list of Tensor, (t,)
        For every prompt, where its tokens are, first to last.
    hidden : Tensor, (1, tokens, d)
        The residual stream at the input of the first block of the slice, before what :func:`dctlib.steer` adds there,
        which a replay inside the same context adds itself.
    calls : list of (args, kwargs)
        What the model passed to each block besides the residual: masks, rotary embeddings, positions.
    """

    tokens: Tensor
    paths: list[Tensor]
    hidden: Tensor
    calls: list[tuple[tuple, dict[str, Any]]]

    def last(self, positions: int = 1) -> Tensor:
        """Where the last `positions` tokens of every prompt are, prompt after prompt: (prompts · positions,)."""
        return torch.cat([path[-positions:] for path in self.paths])


def capture(model: PreTrainedModel, tree: PromptTree, *, source: int, target: int) -> Capture:
    """Run the prompts of a tree and keep the inputs of blocks source … target−1.

    Call it inside :func:`dctlib.models.replaying`.
    """
    hidden: list[Tensor] = []
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def keep(_block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if args:
            residual, args = args[0], args[1:]
        else:
            residual = kwargs["hidden_states"]
        hidden.append(residual.detach())
        calls.append((args, {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    handles = []
    try:
        for block in list(blocks_of(model))[source:target]:
            handles.append(block.register_forward_pre_hook(keep, prepend=True, with_kwargs=True))  # noqa: PERF401
        with torch.no_grad():
            model.base_model(**tree.arguments(model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Capture(tree.tokens, tree.paths, hidden[0], calls)


def activations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, layer: int, positions: int = 3
) -> Float[Tensor, "n d"]:
    """Mean of h_layer over the last `positions` tokens of each text, float32 on the CPU.

    Raises
    ------
    ValueError
        If the layer is out of range, there is no text, or one has fewer tokens than `positions`.
    """
    check_layer(model, layer)
    rows = tokenize_each(tokenizer, texts)
    if not 1 <= positions <= (shortest := min(row.shape[1] for row in rows)):
        raise ValueError(f"got positions={positions}, expected 1 to {shortest}, the tokens of the shortest text")
    with replaying(model):
        runs = [capture(model, tree, source=layer, target=layer + 1) for tree in plant(model, rows)]
    last = torch.cat([run.hidden[0, run.last(positions)].float().cpu() for run in runs])
    return last.reshape(len(texts), positions, -1).mean(1)


def replay(blocks: Sequence[nn.Module], capture: Capture, theta: Tensor) -> Tensor:
    """Run the captured slice with θ_l added to h_s at every position: (m, d) → (m, tokens, d).

    Blocks may lie on several devices, where accelerate's hooks move what they are given; the result lies with h_s.
    """
    hidden = capture.hidden + theta.to(capture.hidden)[:, None]
    for block, (args, kwargs) in zip(blocks, capture.calls, strict=True):
        output = block(hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden.to(capture.hidden.device)


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
        self.d_source = self.d_target = width_of(model)
        self.tokens = [len(path) for captured in captures for path in captured.paths]
        blocks: list[Any] = list(blocks_of(model)[source:target])
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
        count = len(blocks_of(model))
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
        with replaying(model):
            captures = [capture(model, tree, source=source, target=target) for tree in plant(model, tokens)]
        options: dict[str, Any] = {"positions": positions, "chunk_size": chunk_size, "memory": memory}
        options |= {"compiled": compiled, "device": device}
        with replaying(model):  # copies of blocks stay as they are here
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
        with replaying(self._model):
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
