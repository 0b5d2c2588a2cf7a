"""Capture the inputs of a slice of blocks once, and replay the slice under added vectors."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.models.blocks import check_layer, eager_attention, get_blocks
from dctlib.models.chat import tokenize_each
from dctlib.models.packing import PromptTree, pack_prompts


@dataclass(frozen=True)
class Capture:
    """The inputs of a slice of blocks in one run of some prompts: what its replay needs.

    Attributes
    ----------
    tokens : Tensor, (1, tokens)
        Token ids; what some prompts share is there once.
    paths : list of Tensor, (t,)
        For every prompt, the positions of its tokens in `tokens`, first to last.
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
        """Return where the last `positions` tokens of every prompt are, prompt after prompt: (prompts · positions,)."""
        return torch.cat([path[-positions:] for path in self.paths])


def capture(model: PreTrainedModel, tree: PromptTree, *, source: int, target: int) -> Capture:
    """Run the prompts of a tree once and return the inputs of blocks source … target−1.

    Call it inside :func:`dctlib.models.blocks.eager_attention`.
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

    with ExitStack() as hooks, torch.no_grad():
        for block in list(get_blocks(model))[source:target]:
            handle = block.register_forward_pre_hook(keep, prepend=True, with_kwargs=True)
            hooks.callback(handle.remove)
        model.base_model(**tree.arguments(model), use_cache=False)
    return Capture(tree.tokens, tree.paths, hidden[0], calls)


def activations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, layer: int, positions: int = 3
) -> Float[Tensor, "n d"]:
    """Return the mean of h_layer over the last `positions` tokens of each text, float32 on the CPU.

    Parameters
    ----------
    texts : sequence of str
        Whole prompts (see :func:`dctlib.format_chat`).
    layer : int
        As in Hugging Face's ``hidden_states``: the input of block `layer`.

    Raises
    ------
    ValueError
        If the layer is out of range, there is no text, or one has fewer tokens than `positions`.
    """
    check_layer(model, layer)
    rows = tokenize_each(tokenizer, texts)
    if not 1 <= positions <= (shortest := min(row.shape[1] for row in rows)):
        raise ValueError(f"got positions={positions}, expected 1 to {shortest}, the tokens of the shortest text")
    with eager_attention(model):
        runs = [capture(model, tree, source=layer, target=layer + 1) for tree in pack_prompts(model, rows)]
    last = torch.cat([run.hidden[0, run.last(positions)].float().cpu() for run in runs])
    return last.reshape(len(texts), positions, -1).mean(1)


def replay(blocks: Sequence[nn.Module], capture: Capture, theta: Tensor) -> Tensor:
    """Run the captured slice with θ_l added to h_s at every position, and return h_t: (m, d) → (m, tokens, d).

    Blocks may lie on several devices, where accelerate's hooks move what they are given; the result lies with h_s.
    """
    hidden = capture.hidden + theta.to(capture.hidden)[:, None]
    for block, (args, kwargs) in zip(blocks, capture.calls, strict=True):
        output = block(hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden.to(capture.hidden.device)
