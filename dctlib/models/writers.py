"""The modules that write to the residual stream, found by what they add to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dctlib.models.blocks import tolerance
from dctlib.models.trace import Call, Trace, once_per_model, trace_model


@dataclass(frozen=True)
class ResidualWriters:
    """Modules whose outputs are added to the residual stream, and the weights that they write with.

    Attributes
    ----------
    modules : list of nn.Module
        Those that make h_0, then those whose outputs each block adds, such as attention and MLP, or norms after them.
    embeddings : list or None
        Embedding tables whose rows make h_0. None where no edit of a table projects h_0.
    projections : list or None
        The last matrices of attention and MLP, ``nn.Linear`` or GPT-2's transposed ``Conv1D``. None for a family
        with norms or mixtures of experts after them, because no edit of a matrix projects what those write.
    """

    modules: list[nn.Module]
    embeddings: list[Any] | None
    projections: list[Any] | None


@once_per_model
def residual_writers(model: PreTrainedModel) -> ResidualWriters:
    """Return every module that writes to the residual stream of `model`.

    In one run on a few tokens, what each block adds to its input must be the sum of the outputs of the modules
    returned, each times a number, and h_0 likewise.

    Raises
    ------
    ValueError
        If it is not, because a block rescales coordinates of the stream, normalises it or keeps several streams.
    """
    trace = trace_model(model)
    near = tolerance(model.dtype)
    embeddings = _parts_of_input(trace, near, nn.Module)
    sublayers = [_parts_of_block(trace, i, near, lambda _module: True) for i in range(len(trace.blocks))]
    passed_on = all(
        _is_near(after.input, before.output, near)
        for before, after in zip(trace.blocks[:-1], trace.blocks[1:], strict=True)
    )
    if embeddings is None or not passed_on or None in sublayers:
        raise ValueError(
            f"the residual stream of {type(model).__name__} is not a sum of what its layers write, so a direction "
            "cannot be ablated from them; steer with the negative of a vector instead"
        )
    matrices = [_parts_of_block(trace, i, near, _is_matrix) for i in range(len(trace.blocks))]
    return ResidualWriters(
        _distinct([*embeddings, *(module for each in sublayers for module in each or [])]),
        _parts_of_input(trace, near, nn.Embedding),
        None if None in matrices else _distinct([module for each in matrices for module in each or []]),
    )


def _parts_of_input(trace: Trace, near: float, kind: type[nn.Module]) -> list[nn.Module] | None:
    """Return modules of a kind that run before the first block and whose outputs sum to its input."""
    first = trace.blocks[0]
    before = [call for call in trace.calls if call.end < first.start and isinstance(call.module, kind)]
    return _summands(first.input, None, before, near)


def _parts_of_block(
    trace: Trace, number: int, near: float, admits: Callable[[nn.Module], bool]
) -> list[nn.Module] | None:
    """Return modules inside a block whose outputs sum to what it adds; outer ones are preferred to inner ones."""
    block, hidden = trace.blocks[number], trace.inputs[number]
    inside = [c for c in trace.calls if block.start < c.start and c.end < block.end and admits(c.module)]
    inside = [call for call in inside if not _is_near(call.output, block.output, near)]  # holds the stream itself
    depths = sorted({call.path.count(".") for call in inside})
    for deepest in depths:
        near_surface = [call for call in inside if call.path.count(".") <= deepest]
        if found := _summands(block.output, hidden, near_surface, near):
            return found
    return None


def _summands(
    total: Tensor | None, carried: Tensor | None, calls: Sequence[Call], near: float
) -> list[nn.Module] | None:
    """Return the fewest modules whose outputs, each times a number, sum with `carried` to `total`; None if none do."""
    assert total is not None
    outputs = {
        call: call.output.expand_as(total)
        for call in calls
        if call.output is not None and call.output.is_floating_point() and _spans(call.output.shape, total.shape)
    }
    parts = [total, *([] if carried is None else [carried]), *outputs.values()]
    # Rounding grows with a coordinate's size, and a few coordinates are huge: so each is scaled to count alike.
    sizes = torch.stack([part.double().abs() for part in parts[: 1 if carried is None else 2]]).sum(0)
    sizes = (sizes + 1e-3 * sizes.square().mean().sqrt()).flatten()
    columns = torch.stack([part.double().flatten() / sizes for part in parts], 1)
    products = columns.T @ columns  # from which every least-squares fit below is computed
    added = columns[:, 0] if carried is None else columns[:, 0] - columns[:, 1]
    allowed = near * added.norm() + torch.finfo(total.dtype).eps * len(added) ** 0.5
    first = len(parts) - len(outputs)
    index = {call: first + i for i, call in enumerate(outputs)}

    def fits(chosen: Sequence[Call]) -> bool:
        """Return whether total = c₀ carried + Σ cᵢ outputᵢ for some numbers, with c₀ ≠ 0."""
        used = [*range(1, first), *(index[call] for call in chosen)]
        scales = products.diagonal()[used].sqrt().clamp_min(1e-30)
        gram = products[used][:, used] / (scales[:, None] * scales)
        weights = torch.linalg.pinv(gram, hermitian=True, rtol=1e-12) @ (products[used, 0] / scales) / scales
        left = (columns[:, 0] - columns[:, used] @ weights).norm()
        return bool(left <= allowed) and (carried is None or abs(weights[0].item()) > 1e-3)

    kept = list(outputs)
    if not kept or not fits(kept):
        return None
    # The deepest first, then the earliest: of two modules with the same output the outer or later one stays.
    for call in sorted(outputs, key=lambda call: (-call.path.count("."), call.start)):
        fewer = [other for other in kept if other is not call]
        if fewer and fits(fewer):
            kept = fewer
    return [call.module for call in kept]


def _spans(shape: torch.Size, whole: torch.Size) -> bool:
    """Return whether a tensor of `shape` has a row for every token, as learned positions without a batch do."""
    return shape in (whole, whole[1:], (1, *whole[1:]))


def _is_near(a: Tensor | None, b: Tensor | None, near: float) -> bool:
    return a is not None and b is not None and a.shape == b.shape and bool((a - b).norm() <= 1e-2 * near * b.norm())


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and module.weight.is_floating_point()


def _distinct(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return list(dict.fromkeys(modules))
