"""Capture the inputs of a slice of blocks once, and replay the slice under added vectors."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.models.blocks import (
    check_layer,
    eager_attention,
    get_blocks,
    output_residual,
    residual_width,
    split_residual,
    tolerance,
    unwrap,
)
from dctlib.models.chat import tokenize_each
from dctlib.models.packing import PromptTree, pack_prompts
from dctlib.models.trace import once_per_model, probe_tokens


@dataclass(frozen=True)
class Capture:
    """The inputs of a slice of blocks in one run of some prompts: what its replay needs.

    Attributes
    ----------
    tokens : Tensor, (1, tokens)
        Token ids. A beginning that several prompts share is there once.
    paths : list of Tensor, (t,)
        For every prompt, the positions of its tokens in `tokens`, first to last.
    hidden : Tensor, (1, tokens, d)
        The residual stream at the input of the slice's first block, without the vector that :func:`dctlib.steer` adds
        there. A replay inside the same context adds that vector itself.
    calls : list of (args, kwargs)
        Arguments of each block other than the residual: masks, rotary embeddings, positions.
    takes_batches : bool
        Whether blocks accept these arguments with any number of rows. If not, a replay runs its rows one at a time.
    """

    tokens: Tensor
    paths: list[Tensor]
    hidden: Tensor
    calls: list[tuple[tuple, dict[str, Any]]]
    takes_batches: bool = True

    def last(self, positions: int = 1) -> Tensor:
        """Return the indices of the last `positions` tokens of every prompt, in order: (prompts · positions,)."""
        return torch.cat([path[-positions:] for path in self.paths])


def capture(model: PreTrainedModel, tree: PromptTree, *, source: int, target: int) -> Capture:
    """Run the prompts of a tree once and return the inputs of blocks source … target−1.

    Call it inside :func:`dctlib.models.blocks.eager_attention`.

    Raises
    ------
    ValueError
        As :func:`verify_replay`, or if a prompt is longer than the model's positions.
    """
    takes_batches = verify_replay(model, source, target)
    return _capture(model, tree, source, target, takes_batches)


def _capture(model: PreTrainedModel, tree: PromptTree, source: int, target: int, takes_batches: bool) -> Capture:
    hidden: list[Tensor] = []
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def keep(_block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        residual, other_args, other_kwargs = split_residual(args, kwargs)
        hidden.append(residual.detach())
        calls.append((other_args, other_kwargs))

    # A model that was compiled earlier would not call the hooks.
    with ExitStack() as hooks, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for block in list(get_blocks(model))[source:target]:
            handle = block.register_forward_pre_hook(keep, prepend=True, with_kwargs=True)
            hooks.callback(handle.remove)
        try:
            unwrap(model).base_model(**tree.arguments(model), use_cache=False)
        except IndexError as error:  # of learned positions
            raise ValueError(
                f"the model cannot run a prompt of {max(map(len, tree.paths))} tokens ({error}); use shorter prompts"
            ) from error
    return Capture(tree.tokens, tree.paths, hidden[0], calls, takes_batches)


@once_per_model
def verify_replay(model: PreTrainedModel, source: int, target: int) -> bool:
    """Check that replaying blocks source … target−1 gives what the whole model gives with a vector added at `source`.

    Three random vectors, half as long as the residual stream, are tried on a few tokens. One of them has to agree,
    because a mixture of experts may choose other experts where rounding differs.

    Returns
    -------
    bool
        Whether several vectors may be replayed as one batch.

    Raises
    ------
    ValueError
        If the replay differs from the whole model or is impossible, or the activations are not finite.
    """
    name, blocks = type(model).__name__, list(get_blocks(model))
    tokens = probe_tokens(model)
    with torch.no_grad(), eager_attention(model), torch.compiler.set_stance("force_eager"):
        try:
            single = _capture(model, PromptTree.from_prompts(tokens.tolist()), source, target, takes_batches=False)
            stream = (*tokens.shape, residual_width(model))
            if single.hidden.shape != stream:
                raise ValueError(f"the residual stream has shape {tuple(single.hidden.shape)}, expected {stream}")
            scale = single.hidden.norm(dim=-1).median() / 2
            generator = torch.Generator().manual_seed(0)
            theta = torch.randn(3, single.hidden.shape[-1], generator=generator).to(single.hidden)
            theta = scale * theta / theta.norm(dim=1, keepdim=True)
            clean, *steered = [_whole_run(model, tokens, blocks, source, target, row) for row in (0 * theta[0], *theta)]
            alone = replay(blocks[source:target], single, theta)
        except Exception as error:
            raise ValueError(f"blocks {source} to {target - 1} of {name} cannot be replayed alone: {error}") from error
        if not clean.isfinite().all():
            raise ValueError(f"the model's activations at layer {target} are not finite; try dtype='float32'")

        def least_error(replayed: Tensor) -> float:
            return min(((a - b).norm() / (b - clean).norm()).item() for a, b in zip(replayed, steered, strict=True))

        if not least_error(alone) <= tolerance(model.dtype):
            raise ValueError(
                f"blocks {source} to {target - 1} of {name}, replayed alone, differ from the whole model by "
                f"{least_error(alone):.1%} of a vector's effect: they depend on more than their input; try other layers"
            )
        try:
            together = replay(blocks[source:target], replace(single, takes_batches=True), theta)
        except Exception:  # for example, from a mask with a row for each head
            return False
        return least_error(together) <= tolerance(model.dtype)


def _whole_run(
    model: PreTrainedModel, tokens: Tensor, blocks: Sequence[nn.Module], source: int, target: int, vector: Tensor
) -> Float[Tensor, "tokens d"]:
    """Return h_target of a whole forward pass with `vector` added to h_source."""
    found: list[Tensor] = []

    def add(_block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden, args, kwargs = split_residual(args, kwargs)
        return (hidden + vector, *args), kwargs

    def keep(_block: nn.Module, _args: tuple, output: Any) -> None:
        found.append(output_residual(output)[0])

    with (
        blocks[source].register_forward_pre_hook(add, with_kwargs=True),
        blocks[target - 1].register_forward_hook(keep),
    ):
        model(input_ids=tokens, use_cache=False)
    return found[0]


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

    Blocks may lie on several devices; accelerate's hooks then move their inputs. The result is on the device of h_s.
    """
    if not capture.takes_batches and len(theta) > 1:
        return torch.cat([replay(blocks, capture, row) for row in theta.split(1)])
    hidden = capture.hidden + theta.to(capture.hidden)[:, None]
    for block, (args, kwargs) in zip(blocks, capture.calls, strict=True):
        hidden = output_residual(block(hidden, *args, **kwargs))
    return hidden.to(capture.hidden.device)
