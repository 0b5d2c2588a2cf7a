"""Steering and ablation: forward hooks that change the residual stream, and are removed at the end of a context."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import has_offloaded_params
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers import PreTrainedModel

from dctlib.models.blocks import (
    check_layer,
    eager_attention,
    get_blocks,
    get_holders,
    output_residual,
    residual_width,
    split_residual,
    tolerance,
    unwrap,
)
from dctlib.models.plain_copy import has_adapters, plain_copy
from dctlib.models.trace import probe_tokens
from dctlib.models.writers import ResidualWriters, residual_writers
from dctlib.steering.passes import devices_of, is_watched, unhooked, watch_passes


@contextmanager
def steer(
    model: nn.Module,
    *,
    layer: int,
    vector: Float[Tensor, "*batch d"] | ArrayLike,
    positions: str | Bool[Tensor, "*batch tokens"] | ArrayLike = "all",
) -> Iterator[None]:
    """Add `vector` to h_layer, the input of block `layer`, inside the context.

    Prompt and generated tokens are steered alike, with and without a cache, unless `positions` says otherwise. The
    hook is removed at the end, also after an exception. Contexts nest: their vectors add. Compiled parts of the model
    run uncompiled inside.

    Parameters
    ----------
    model : nn.Module
        Any model that :func:`dctlib.models.blocks.get_blocks` knows, also inside PEFT, torch.compile or DataParallel.
    layer : int
        The layer at which the vector was fitted (the transcoder's ``source``). The number of blocks stands for the
        last block's output, before the final norm, which control vectors of other tools steer too.
    vector : Tensor, array or list, (d,) or (batch, d)
        One vector for all rows of the batch, or one for each. Its length is the strength: pass ``R * v``. If
        ``generate`` repeats prompts, for beams or several answers, pass one vector for each prompt.
    positions : {"all", "prompt", "generated"} or bool Tensor, (tokens,) or (batch, tokens)
        Which tokens are steered. The prompt is what ``generate`` is given; outside it, a pass without a cache. A mask
        covers the prompt, padding included, and leaves generated tokens alone.

    Raises
    ------
    ValueError
        If the layer or the shape does not fit the model, the vector is not finite in the model's dtype, or the batch
        has another number of rows than the vector. Inside the context: if a pass of the model does not call the
        hook, or if it is not known which of its tokens belong to the prompt.
    """
    plain, blocks = unwrap(model), get_blocks(model)
    behind_last = layer == len(blocks)
    if not behind_last:
        check_layer(model, layer)
    vectors = as_rows(vector, residual_width(plain), name="vector")
    everywhere = isinstance(positions, str) and positions == "all"
    chosen = _word_or_mask(positions)
    follow = len(vectors) > 1 or not everywhere
    if follow and (devices := devices_of(model)) > 1:
        raise ValueError(
            f"DataParallel splits each batch over {devices} devices, so rows and positions are lost; steer the model "
            f"that it wraps, or use one vector at all positions"
        )
    _cast(vectors, plain.dtype)  # refused before any pass

    def add(hidden: Tensor) -> Tensor:
        if hidden.shape[-1] != vectors.shape[1] or (follow and hidden.ndim != 3):  # some families keep several streams
            expected = f"(batch, tokens, {vectors.shape[1]})"
            raise ValueError(f"the residual at layer {layer} has shape {tuple(hidden.shape)}, expected {expected}")
        cast = vectors.to(hidden.dtype) if hidden.dtype == plain.dtype else _cast(vectors, hidden.dtype)
        added = passes.match_rows(cast.to(hidden.device), len(hidden), name="vectors")
        steered = hidden + (added[:, None] if len(added) > 1 else added[0])
        if hidden.dtype == torch.float16 and (hidden.isfinite() & ~steered.isfinite()).any():
            raise ValueError("the steered residual is beyond float16's range; load the model in bfloat16 or float32")
        if everywhere:
            return steered
        return torch.where(passes.select(chosen, hidden)[..., None], steered, hidden)

    def before_block(_block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden, args, kwargs = split_residual(args, kwargs)
        return (add(hidden), *args), kwargs

    def after_block(_block: nn.Module, _args: tuple, output: Any) -> Any:
        moved = add(output_residual(output))
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    block = blocks[-1] if behind_last else blocks[layer]
    with watch_passes(model, [block], follow=follow) as passes:
        if behind_last:
            hook = block.register_forward_hook(after_block)
        else:
            hook = block.register_forward_pre_hook(before_block, with_kwargs=True)
        with hook:
            yield


@contextmanager
def ablate(model: nn.Module, directions: Float[Tensor, "*k d"] | ArrayLike) -> Iterator[None]:
    """Remove the span of `directions` from everything that writes to the residual stream, inside the context.

    The outputs of the embedding and of every attention and MLP layer are projected on the orthogonal complement, at
    every position, and so are embeddings that the model is given. So the residual has no component in the span,
    unless :func:`steer` adds one. No weight is edited, and the hooks are removed at the end, also after an exception.
    Contexts nest. Compiled parts of the model run uncompiled inside.

    Parameters
    ----------
    model : nn.Module
        Any model that :func:`dctlib.models.blocks.residual_writers` knows, also inside PEFT, torch.compile or
        DataParallel.
    directions : Tensor, array or list, (d,) or (k, d)
        One direction or several; their lengths do not matter.

    Raises
    ------
    ValueError
        If the shape does not fit the model, or a direction is zero or not finite. Inside the context: if a pass of
        the model does not call a hook.
    """
    plain = unwrap(model)
    blocks = get_blocks(model)
    basis = _span(plain, directions)

    def project(_module: nn.Module, _args: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return _without(output, basis)
        first = next(i for i, value in enumerate(output) if isinstance(value, Tensor))
        return type(output)([*output[:first], _without(output[first], basis), *output[first + 1 :]])

    stack = get_holders(model)[-1]
    parameters = [*inspect.signature(stack.forward).parameters]
    place = parameters.index("inputs_embeds") if "inputs_embeds" in parameters else len(parameters)

    def project_given(_stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if kwargs.get("inputs_embeds") is not None:
            kwargs = {**kwargs, "inputs_embeds": _without(kwargs["inputs_embeds"], basis)}
        elif len(args) > place and args[place] is not None:
            args = (*args[:place], _without(args[place], basis), *args[place + 1 :])
        return args, kwargs

    with unhooked(plain):  # an outer context must not change which modules are found
        writers = residual_writers(plain).modules
    inside = {part for block in blocks for part in block.modules()}
    with ExitStack() as hooks:
        for module in writers:
            hooks.enter_context(module.register_forward_hook(project))
        if plain.get_input_embeddings() in writers:
            hooks.enter_context(stack.register_forward_pre_hook(project_given, with_kwargs=True))
        hooks.enter_context(watch_passes(model, [module for module in writers if module in inside]))
        yield


def ablated_copy(model: nn.Module, directions: Float[Tensor, "*k d"] | ArrayLike) -> PreTrainedModel:
    """Return a copy of `model` whose edited weights write nothing into the span of `directions`, for export.

    The copy computes what the model does under :func:`ablate`, which is verified on a few tokens. Active adapters of
    PEFT are merged into its weights. Tied embeddings are untied, because only the input embedding is projected.

    Raises
    ------
    ValueError
        As :func:`ablate`; if weights are offloaded or quantised; if an adapter cannot be merged; if no edit of weights
        equals ablation in this family, such as with a norm or a mixture of experts between a layer's output and the
        residual stream; or if the copy's logits differ from the ablated model's.
    """
    plain = unwrap(model)
    basis = _span(plain, directions)
    if is_watched(plain):
        raise ValueError("the model is being steered or ablated, which a copy would keep; copy it outside the context")
    if any(has_offloaded_params(module) for module in plain.modules()):
        raise ValueError("weights are offloaded, which no edit reaches; load the model whole, with device='cpu'")
    if not has_adapters(plain):
        editable_writers(plain)  # refused before the copy is made
    copied: Any = plain_copy(model)
    writers = editable_writers(copied)
    with torch.no_grad():
        for embedding in writers.embeddings or []:
            embedding.weight.copy_(_without(embedding.weight, basis))
        for projection in writers.projections or []:
            by_output = projection.weight.T if isinstance(projection, nn.Linear) else projection.weight  # (inputs, d)
            by_output.copy_(_without(by_output, basis))
            if projection.bias is not None:
                projection.bias.copy_(_without(projection.bias, basis))
        with eager_attention(plain), ablate(model, directions):
            expected = model(input_ids=probe_tokens(plain), use_cache=False).logits
        with eager_attention(copied):
            found = copied(input_ids=probe_tokens(plain), use_cache=False).logits
    if found.shape != expected.shape or not (found - expected).norm() <= tolerance(plain.dtype) * expected.norm():
        raise ValueError(
            f"an edit of the weights of {type(plain).__name__} gives other logits than ablate(); use ablate(), and "
            f"tell us about this model"
        )
    return copied


def editable_writers(model: PreTrainedModel) -> ResidualWriters:
    """Return the residual writers of `model`, or raise ValueError if an edit of their weights is no ablation."""
    writers = residual_writers(model)
    if writers.projections is None or writers.embeddings is None:
        raise ValueError(
            f"{type(model).__name__} normalises what its layers write, or mixes experts, so no weight edit is an "
            f"ablation; use ablate()"
        )
    for module in (*writers.embeddings, *writers.projections):
        if type(module.weight.data) is not Tensor:
            raise ValueError(
                f"the weight of a {type(module).__name__} is a {type(module.weight.data).__name__}, as in quantised "
                f"models, which no edit reaches; load the model in bfloat16 or float32, or use ablate()"
            )
    return writers


def as_rows(values: Any, d: int, *, name: str) -> Float[Tensor, "k d"]:
    """Return a tensor, array or list of shape (d,) or (k, d) as finite rows, or raise ValueError."""
    try:
        if isinstance(values, (list, tuple)) and any(isinstance(each, Tensor) for each in values):
            values = torch.stack([torch.as_tensor(each) for each in values])
        rows = values.to_dense() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"got a {name} that is no array of numbers ({error}), expected ({d},) or (k, {d})") from error
    if rows.ndim not in (1, 2) or rows.shape[-1] != d or not rows.numel():
        raise ValueError(f"got a {name} of shape {tuple(rows.shape)}, expected ({d},) or (k, {d})")
    if rows.is_complex() or rows.dtype == torch.bool or rows.is_meta:
        raise ValueError(f"got a {name} of {rows.dtype} on {rows.device}, expected real numbers")
    if not rows.isfinite().all():
        raise ValueError(f"got a {name} that is not finite, expected finite numbers")
    return rows.reshape(-1, d)


def _word_or_mask(positions: Any) -> str | Bool[Tensor, "k tokens"]:
    if isinstance(positions, str) and positions in ("all", "prompt", "generated"):
        return positions
    mask = positions if isinstance(positions, Tensor) else np.asarray(positions)
    if str(mask.dtype).removeprefix("torch.") != "bool" or mask.ndim not in (1, 2):
        raise ValueError(
            f"got positions of type {mask.dtype} and shape {tuple(mask.shape)}, expected 'all', 'prompt', 'generated' "
            f"or a boolean mask, (tokens,) or (batch, tokens)"
        )
    return torch.as_tensor(mask).reshape(-1, mask.shape[-1])


def _cast(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    cast = vectors.to(dtype)
    if not cast.isfinite().all():
        raise ValueError(
            f"the steering vector's largest entry, {vectors.abs().max():.3g}, is beyond the range of {dtype}; load the "
            f"model in bfloat16 or float32, or pass a shorter vector"
        )
    return cast


def _span(model: PreTrainedModel, directions: Any) -> Float[Tensor, "k d"]:
    """Return orthonormal rows that span `directions`, in float32 or wider."""
    rows = as_rows(directions, residual_width(model), name="direction")
    rows = rows.detach() / rows.detach().abs().amax(dim=1, keepdim=True)  # in its own type, which holds its length
    rows = rows.to(model.device, torch.promote_types(model.dtype, torch.float32))
    if not rows.isfinite().all():
        raise ValueError("got a direction that is zero or not finite, expected one of any other length")
    _, values, right = torch.linalg.svd(torch.nn.functional.normalize(rows), full_matrices=False)
    return right[values > len(rows) * torch.finfo(rows.dtype).eps * values[0]]


def _without(hidden: Float[Tensor, "*rows d"], basis: Float[Tensor, "k d"]) -> Float[Tensor, "*rows d"]:
    basis = basis.to(hidden.device)
    wide = hidden.to(basis.dtype)
    return (wide - (wide @ basis.T) @ basis).to(hidden.dtype)
