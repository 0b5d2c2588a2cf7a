"""Steering and ablation: forward hooks that change the residual stream, and are removed at the end of a context."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dctlib.models.blocks import check_layer, get_blocks, residual_width
from dctlib.models.writers import residual_writers


@contextmanager
def steer(model: PreTrainedModel, *, layer: int, vector: Float[Tensor, "*batch d"]) -> Iterator[None]:
    """Add `vector` to h_layer, the input of block `layer`, at every position, inside the context.

    Prompt and generated tokens are steered alike, with and without a cache. The hook is removed at the end, also after
    an exception. Contexts nest: their vectors add.

    Parameters
    ----------
    model : PreTrainedModel
        Any model that :func:`dctlib.models.blocks.get_blocks` knows.
    layer : int
        The layer at which the vector was fitted (the transcoder's ``source``). The number of blocks stands for the
        last block's output, before the final norm, which control vectors of other tools steer too.
    vector : Tensor, (d,) or (batch, d)
        One vector for all rows of the batch, or one for each. Its length is the strength: pass ``R * v``.

    Raises
    ------
    ValueError
        If the layer or the shape does not fit the model, the vector is not finite, or the batch has another number
        of rows than the vector.
    """
    blocks = get_blocks(model)
    behind_last = layer == len(blocks)
    if not behind_last:
        check_layer(model, layer)
    d = residual_width(model)
    if vector.ndim not in (1, 2) or vector.shape[-1] != d:
        raise ValueError(f"got a vector of shape {tuple(vector.shape)}, expected ({d},) or (batch, {d})")
    if not vector.isfinite().all():
        raise ValueError("the steering vector is not finite")

    def add(hidden: Tensor) -> Tensor:
        if vector.ndim == 2 and len(vector) not in (1, len(hidden)):
            raise ValueError(f"got {len(vector)} vectors for a batch of {len(hidden)} rows, expected one vector a row")
        added = vector.to(hidden.device, hidden.dtype)
        return hidden + (added if added.ndim == 1 else added[:, None])

    def before_block(_block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (add(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": add(kwargs["hidden_states"])}

    def after_block(_block: nn.Module, _args: tuple, output: Any) -> Any:
        return (add(output[0]), *output[1:]) if isinstance(output, tuple) else add(output)

    if behind_last:
        hook = blocks[-1].register_forward_hook(after_block)
    else:
        hook = blocks[layer].register_forward_pre_hook(before_block, with_kwargs=True)
    with hook:
        yield


@contextmanager
def ablate(model: PreTrainedModel, directions: Float[Tensor, "*k d"]) -> Iterator[None]:
    """Remove the span of `directions` from everything that writes to the residual stream, inside the context.

    The outputs of the embedding and of every attention and MLP layer are projected on the orthogonal complement, at
    every position. So the residual has no component in the span, unless :func:`steer` adds one. No weight is edited,
    and the hooks are removed at the end, also after an exception. Contexts nest.

    Parameters
    ----------
    model : PreTrainedModel
        Any model that :func:`dctlib.models.blocks.residual_writers` knows.
    directions : Tensor, (d,) or (k, d)
        One direction or several; their lengths do not matter.

    Raises
    ------
    ValueError
        If the shape does not fit the model, or a direction is zero or not finite.
    """
    basis = _span(model, directions)

    def project(_module: nn.Module, _args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (_without(output[0], basis), *output[1:])
        return _without(output, basis)

    with ExitStack() as hooks:
        for module in residual_writers(model).modules:
            hooks.enter_context(module.register_forward_hook(project))
        yield


def ablated_copy(model: PreTrainedModel, directions: Float[Tensor, "*k d"]) -> PreTrainedModel:
    """Return a copy of `model` whose edited weights write nothing into the span of `directions`, for export.

    It computes what the model does under :func:`ablate`. Tied embeddings are untied, because the input embedding is
    projected and the unembedding is not.

    Raises
    ------
    ValueError
        As :func:`ablate`; if weights are offloaded; and for families with a norm between a layer's output and the
        residual stream (Gemma 2 and 3, OLMo 2), where no edit of the weights is equal to it.
    """
    basis = _span(model, directions)
    if any(has_offloaded_params(module) for module in model.modules()):
        raise ValueError("weights are offloaded, which no edit reaches; load the model whole, as on device='cpu'")
    if residual_writers(model).projections is None or residual_writers(model).embeddings is None:
        raise ValueError(
            f"{type(model).__name__} normalises what its layers write, so no weight edit is an ablation; use ablate()"
        )
    copied: Any = copy.deepcopy(model)
    writers = residual_writers(copied)
    with torch.no_grad():
        head = copied.get_output_embeddings()
        if head.weight is copied.get_input_embeddings().weight:
            head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
            copied.config.get_text_config().tie_word_embeddings = copied.config.tie_word_embeddings = False
        for embedding in writers.embeddings or []:
            embedding.weight.copy_(_without(embedding.weight, basis))
        for projection in writers.projections or []:
            by_output = projection.weight.T if isinstance(projection, nn.Linear) else projection.weight  # (inputs, d)
            by_output.copy_(_without(by_output, basis))
            if projection.bias is not None:
                projection.bias.copy_(_without(projection.bias, basis))
    return copied


def _span(model: PreTrainedModel, directions: Tensor) -> Tensor:
    """Return orthonormal rows that span `directions`, (k, d), in float32 or wider."""
    d = residual_width(model)
    if directions.ndim not in (1, 2) or directions.shape[-1] != d or not directions.numel():
        raise ValueError(f"got directions of shape {tuple(directions.shape)}, expected ({d},) or (k, {d})")
    rows = directions.reshape(-1, d).to(model.device, torch.promote_types(model.dtype, torch.float32))
    lengths = rows.norm(dim=1, keepdim=True)
    if not (lengths > 0).all() or not rows.isfinite().all():
        raise ValueError("a direction to ablate is zero or not finite")
    _, values, right = torch.linalg.svd(rows / lengths, full_matrices=False)
    return right[values > len(rows) * torch.finfo(rows.dtype).eps * values[0]]


def _without(hidden: Float[Tensor, "*rows d"], basis: Float[Tensor, "k d"]) -> Float[Tensor, "*rows d"]:
    basis = basis.to(hidden.device)
    wide = hidden.to(basis.dtype)
    return (wide - (wide @ basis.T) @ basis).to(hidden.dtype)
