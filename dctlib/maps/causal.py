"""The causal map Δ(θ): add θ to the residual stream at the source layer, measure the change at the target layer."""

import copy
import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from accelerate.utils import has_offloaded_params, send_to_device
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.maps.autograd import AutogradMap, Term
from dctlib.maps.base import Product
from dctlib.maps.replay import Capture, capture, replay
from dctlib.models.blocks import check_layer, eager_attention, get_blocks, has_hooks, residual_width, unwrap
from dctlib.models.chat import tokenize_each
from dctlib.models.fingerprint import ADAPTER_STATE, model_digest
from dctlib.models.packing import pack_prompts

Reduction = Literal["mean", "concatenate"]

# Numbers that one factor's forward and backward pass keeps in memory for each block: for each token, in units of the
# model width, and for each head and pair of tokens, because attention is eager. Measured on Llama-shaped blocks. Only
# the chunk size depends on them.
_KEPT_PER_TOKEN = 40

_KEPT_PER_PAIR = 3

_CPU_CHUNK_BYTES = 320 * 2**20


class CausalMap(AutogradMap):
    """The map Δ(θ) of a transformer slice: the mean of h_t(θ) − h_t(0) over prompts and their last positions.

    θ is added to h_s, the residual stream at the input of block s, at every position. Build the map with
    :meth:`from_model`. One pass over the prompts records the inputs of blocks s … t−1, and products replay these blocks
    alone. So a pass costs (t − s) / (number of blocks) of a full one, and the result is exact. A beginning that several
    prompts share, such as a chat template, is run once for all of them.

    With ``reduction="concatenate"`` the map is Δ_concat(θ) = (Δ_1(θ), …, Δ_n(θ)) ∈ R^{n·d}, where Δ_i is the map of
    prompt i alone. The post's footnote 22 compares it with the mean, which keeps only changes that prompts have in
    common. In the concatenation the changes of single prompts count too: ‖Δ_concat‖² is the sum of ‖Δ_i‖², the
    objective of the original MELBO. Rows of V are steering vectors in both. A row of U then holds one change for each
    prompt, so it cannot be ablated.

    Attributes
    ----------
    positions : int
        Last positions of each prompt over which the change is averaged.
    reduction : {"mean", "concatenate"}
        How prompts are combined.
    tokens : list of int
        Number of tokens of each prompt.
    chunk_size : int
        Factors replayed at once. :meth:`from_model` chooses it by `memory`; it may be set afterwards.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        captures: Sequence[Capture],
        blocks: Sequence[Any],
        *,
        source: int,
        target: int,
        positions: int,
        reduction: Reduction,
        copied: bool = False,
    ):
        self.source, self.target = source, target
        self.positions, self.reduction = positions, reduction
        self.tokens = [len(path) for captured in captures for path in captured.paths]
        self.d_source = residual_width(model)
        self.d_target = self.d_source * (1 if reduction == "mean" else len(self.tokens))
        hidden = captures[0].hidden
        self.device = hidden.device
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.scale = torch.cat([c.hidden[0] for c in captures]).to(self.dtype).norm(dim=1).median().item()
        self._model, self._captures, self._blocks = model, captures, blocks
        self._copied, self._state = copied, _state_of(model)
        with torch.no_grad(), self._context():
            zero = torch.zeros(1, self.d_source, dtype=self.dtype, device=self.device)
            self._at_zero = torch.stack([term(zero)[0] for term in self._terms()]).sum(0)
        if not torch.isfinite(self._at_zero).all():
            raise ValueError(f"the model's activations at layer {target} are not finite; try dtype='float32'")

    @classmethod
    @torch.inference_mode(False)  # whose tensors have no gradients
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        *,
        source: int,
        target: int,
        positions: int = 3,
        reduction: Reduction = "mean",
        memory: float | None = None,
        compiled: bool = False,
        device: str | torch.device | None = None,
    ) -> "CausalMap":
        """Run `texts` once and return their causal map from layer `source` to layer `target`.

        Parameters
        ----------
        texts : sequence of str
            Whole prompts (see :func:`dctlib.format_chat`). They are not padded, and none attends to another.
        source, target : int
            Layers as in Hugging Face's ``hidden_states``: h_s is the input of block s. If ``target`` is the number of
            blocks, h_t is the last block's output before the final norm.
        positions : int
            The change is averaged over the last `positions` tokens of every prompt.
        reduction : {"mean", "concatenate"}
            ``"mean"``: average the change over prompts, d_target = d. ``"concatenate"``: keep the changes of all
            prompts side by side, in the order of `texts`, d_target = n·d.
        memory : float, optional
            GiB for the forward and backward pass of a chunk, besides the model. It sets `chunk_size`, the number of
            factors replayed at once. The default is a quarter of the free memory on a GPU, and 320 MiB on a CPU, whose
            caches favour small chunks. If a GPU runs out of memory all the same, the chunk is halved.
        compiled : bool
            Compile the blocks with torch.compile. On a GPU this saves time from about three hundred passes on: the
            first pass takes half a minute, and later ones take 0.7 of their time. It changes cost, not results.
            Forward-mode products are not compiled.
        device : str or torch.device, optional
            Copy the slice's blocks to this device and compute all products there, while the model stays where it is.
            This serves a GPU that can hold the slice but not the model: load the model with ``device="cpu"``. Later
            changes of the model, such as :func:`dctlib.steer`, do not reach the copies. The default is to copy nothing.

        Raises
        ------
        ValueError
            If the layers are out of range or out of order, there is no text, a text has fewer tokens than
            `positions`, an option is out of range, the slice cannot be replayed alone, the activations are not finite,
            or `device` is given and blocks are offloaded. The map itself raises ValueError if the model is steered,
            ablated or edited after the map was built.
        """
        all_blocks = get_blocks(model)
        source = check_layer(model, source, name="source")
        if not isinstance(target, Integral) or not source < target <= len(all_blocks):
            raise ValueError(f"got source={source}, target={target!r}, expected source < target <= {len(all_blocks)}")
        target = int(target)
        if positions < 1 or (memory is not None and memory <= 0):
            raise ValueError(f"got positions={positions}, memory={memory}, expected positions >= 1 and memory > 0")
        if reduction not in get_args(Reduction):
            raise ValueError(f"got reduction={reduction!r}, expected one of {get_args(Reduction)}")
        tokens = [row.to(model.device) for row in tokenize_each(tokenizer, texts)]
        for text, row in zip(texts, tokens, strict=True):
            if row.shape[1] < positions:
                raise ValueError(
                    f"prompt {text!r} has {row.shape[1]} tokens, fewer than positions={positions}; use longer prompts "
                    f"or fewer positions"
                )
        blocks: list[Any] = list(all_blocks[source:target])
        with eager_attention(model):  # copies of blocks keep eager attention
            captures = [capture(model, tree, source=source, target=target) for tree in pack_prompts(model, tokens)]
            if device is not None:
                blocks = _copy_to(device, blocks)
                captures = [replace(captured, **send_to_device(vars(captured), device)) for captured in captures]
        if compiled:
            blocks = [torch.compile(block) for block in blocks]
        layers = {"source": source, "target": target}
        cmap = cls(
            model, captures, blocks, **layers, positions=positions, reduction=reduction, copied=device is not None
        )
        heads = getattr(unwrap(model).config.get_text_config(), "num_attention_heads", 0)  # none in a state-space model
        cmap.chunk_size = _chunk_size(cmap, captures, heads, memory)
        return cmap

    @cached_property
    def digest(self) -> str:
        """A hash of all that the map depends on: weights, configuration, tokens, slice, positions and reduction.

        It does not cover residuals, whose last bits depend on the number of threads.

        Raises
        ------
        ValueError
            If the model has hooks, such as those of :func:`dctlib.steer`, which no digest covers, or has changed.
        """
        self._check_state()
        if has_hooks(self._model):
            raise ValueError(
                "the model has hooks, such as those of steer() and ablate(), which the key of a remembered fit does "
                "not cover; fit without a cache there"
            )
        digest = hashlib.sha256(f"{model_digest(self._model)} {self.source} {self.target} {self.positions}".encode())
        for captured in self._captures:
            digest.update(str([captured.tokens[0, path].tolist() for path in captured.paths]).encode())
        if self.reduction == "concatenate":
            return hashlib.sha256(f"concatenated {digest.hexdigest()}".encode()).hexdigest()
        return digest.hexdigest()

    def _product(self, name: Product, **rows: Tensor) -> Tensor:
        if not self._copied:
            self._check_state()
        if name.startswith("second_derivative") and _is_offloaded(self._blocks):
            raise ValueError(
                "the slice's blocks are offloaded in part, and second derivatives (quadratic fits) cannot fetch "
                "weights; free device memory, or fit exponential or linear factors"
            )
        return super()._product(name, **rows)

    def _check_state(self) -> None:
        """Raise ValueError unless the model is in the state in which its residuals were captured."""
        if _state_of(self._model) != self._state:
            raise ValueError(
                "the model was steered, ablated, hooked or edited since this map was built, or is no longer; build the "
                "map again, and use it inside the same contexts"
            )

    def _terms(self) -> Sequence[Term]:
        term = self._mean_change if self.reduction == "mean" else self._change_of_each
        firsts = [0]
        for captured in self._captures:
            firsts.append(firsts[-1] + len(captured.paths))
        return [partial(term, captured, first) for captured, first in zip(self._captures, firsts, strict=False)]

    def _mean_change(self, captured: Capture, _first: int, theta: Tensor) -> Float[Tensor, "m d"]:
        hidden = replay(self._blocks, captured, theta)[:, captured.last(self.positions)]
        return hidden.to(self.dtype).sum(1) / (len(self.tokens) * self.positions)

    def _change_of_each(self, captured: Capture, first: int, theta: Tensor) -> Float[Tensor, "m n_d"]:
        """Return the changes of this capture's prompts, from number `first` on, and zeros for all other prompts."""
        hidden = replay(self._blocks, captured, theta)[:, captured.last(self.positions)].to(self.dtype)
        each = hidden.unflatten(1, (-1, self.positions)).mean(2)  # (m, prompts of this capture, d)
        after = len(self.tokens) - first - len(captured.paths)
        return F.pad(each.flatten(1), (first * self.d_source, after * self.d_source))

    def _clean(self) -> Tensor:
        return self._at_zero

    def _context(self) -> AbstractContextManager[None]:
        return eager_attention(self._model)

    @property
    def _precision(self) -> torch.dtype:
        return self._captures[0].hidden.dtype


def _state_of(model: Any) -> list[Any]:
    """Return what tells a model from itself with other hooks, adapters or weights: numbers that each change replaces.

    Weights that are offloaded are left out, because each pass fetches them anew.
    """
    state: list[Any] = []
    for module in unwrap(model).modules():
        state += [*module._forward_pre_hooks, *module._forward_hooks]
        if hasattr(module, "disable_adapters"):
            state.append(repr([getattr(module, name, None) for name in ADAPTER_STATE]))
        if not has_offloaded_params(module):
            weights = [value for value in module._parameters.values() if value is not None]
            state += [(id(weight), 0 if weight.is_inference() else weight._version) for weight in weights]
    return state


def _is_offloaded(blocks: Sequence[Any]) -> bool:
    return any(has_offloaded_params(module) for block in blocks for module in block.modules())


def _copy_to(device: str | torch.device, blocks: Sequence[Any]) -> list[Any]:
    if _is_offloaded(blocks):
        raise ValueError(f"got device={device!r} and offloaded blocks, expected a model loaded whole; use device='cpu'")
    return [copy.deepcopy(block).to(device) for block in blocks]


def _chunk_size(cmap: CausalMap, captures: Sequence[Capture], heads: int, memory: float | None) -> int:
    """Return how many rows have forward and backward passes that fit in `memory` GiB, or in the device's default."""
    tokens = max(captured.hidden.shape[1] for captured in captures)
    kept = tokens * (_KEPT_PER_TOKEN * cmap.d_source + _KEPT_PER_PAIR * heads * tokens)
    bytes_per_row = kept * len(captures[0].calls) * captures[0].hidden.element_size()
    if memory is not None:
        budget = memory * 2**30
    elif cmap.device.type == "cuda":
        budget = torch.cuda.mem_get_info(cmap.device)[0] / 4
    else:
        budget = _CPU_CHUNK_BYTES
    return max(1, int(budget / bytes_per_row))
