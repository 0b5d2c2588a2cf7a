"""Logits at given residuals, computed by the model's own forward pass without running its blocks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from dctlib.models.blocks import get_holders, tolerance, unwrap
from dctlib.models.trace import once_per_model, trace_model


def compute_logits(
    model: PreTrainedModel, hidden: Float[Tensor, "*rows d"], tokens: Int[Tensor, " k"] | None = None
) -> Float[Tensor, "*rows k"]:
    """Return the logits of some tokens at residuals after the last block.

    The modules after the last block and the model's own forward pass compute them, so every scale, cap and bias of
    the family is applied. That this equals the model's logits is verified once for each model.

    Parameters
    ----------
    hidden : Tensor, (..., d)
        Output of the last block, before the final norm.
    tokens : Tensor, (k,), optional
        Vocabulary indices; left out, the whole vocabulary.

    Returns
    -------
    Tensor, (..., k)
        Float32.

    Raises
    ------
    ValueError
        If a logit is not finite, or the model computes its logits in another way.
    """
    for module in _modules_behind_blocks(model):
        hidden = module(hidden)
    return check_finite(output_logits(model, hidden, tokens))


def output_logits(
    model: PreTrainedModel, last_hidden_state: Float[Tensor, "*rows d"], tokens: Int[Tensor, " k"] | None = None
) -> Float[Tensor, "*rows k"]:
    """Return the model's logits, in float32, as if its decoder returned `last_hidden_state`; differentiable."""
    model = unwrap(model)
    rows = last_hidden_state.reshape(1, -1, last_hidden_state.shape[-1])
    head = model.get_output_embeddings()
    with ExitStack() as replaced:
        for module in _decoders(model):
            replaced.enter_context(_returning(module, rows))
        if tokens is not None and type(head) is nn.Linear:
            replaced.enter_context(_few_rows(model, head, tokens, rows.device))
            tokens = None
        logits = model(input_ids=torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)).logits[0].float()
    if tokens is not None:
        logits = logits[:, tokens.to(logits.device)]
    return logits.reshape(*last_hidden_state.shape[:-1], logits.shape[-1])


def check_finite(logits: Tensor) -> Tensor:
    """Return `logits`, or raise ValueError if one is NaN or infinite, because rankings put it before every number."""
    # A sum is read once and takes no memory; it is infinite, too, if finite logits are too large to add.
    if not torch.isfinite(logits.sum(dtype=torch.float32)) and not torch.isfinite(logits).all():
        raise ValueError(
            "the model gave logits that are not finite: its weights may be damaged, or a block may overflow; try "
            "dtype='float32', or shorter vectors"
        )
    return logits


@once_per_model
def _modules_behind_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return what the decoder applies to the last block's output, one after another: its final norm, for most."""
    trace = trace_model(model)
    last, decoders = trace.blocks[-1], _decoders(model)
    whole = next(call for call in trace.calls if call.module in decoders)  # some models call an inner one directly
    hidden, modules, now = last.output, [], last.end
    for call in trace.calls:
        if now < call.start < whole.end and _equal(call.input, hidden):
            modules.append(call.module)
            hidden, now = call.output, call.end
    if not _equal(hidden, whole.output) or not _gives(model, modules, last.output, trace.logits[0]):
        raise ValueError(
            f"{type(model).__name__} computes its logits from more than its last block's output, so steered logits "
            "cannot be computed from it; generate completions instead"
        )
    return modules


def _gives(model: PreTrainedModel, modules: list[nn.Module], hidden: Any, logits: Tensor) -> bool:
    """Return whether `modules` and the output head, whole or for a few tokens, give the model's logits of `hidden`."""
    with torch.no_grad():
        for module in modules:
            hidden = module(hidden)
        few = torch.arange(0, logits.shape[-1], max(1, logits.shape[-1] // 64), device=logits.device)
        pairs = [(output_logits(model, hidden)[0], logits), (output_logits(model, hidden, few)[0], logits[:, few])]
    near = tolerance(model.dtype)
    return all(found.shape == own.shape and (found - own).norm() <= near * own.norm() for found, own in pairs)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def _decoders(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules between the model and its list of blocks, outermost first."""
    _, *decoders = get_holders(model)
    if not decoders:
        raise ValueError(f"{type(model).__name__} has no decoder apart from its output head; pass the whole model")
    return decoders


@dataclass
class _Output(BaseModelOutputWithPast):
    """A decoder's output with only the last hidden state; all other fields are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@contextmanager
def _returning(module: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Let `module` return `hidden`, whatever it is called with."""
    own = module.__dict__.get("forward")  # accelerate puts one there

    def forward(*_args: Any, **_kwargs: Any) -> _Output:
        return _Output(last_hidden_state=hidden)  # pyright: ignore[reportArgumentType]

    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def _few_rows(model: PreTrainedModel, head: nn.Linear, tokens: Tensor, device: torch.device) -> Iterator[None]:
    """Reduce the output head to the rows of `tokens` inside the context."""
    path = next(path for path, part in model.named_modules() if part is head)
    parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    with align_module_device(head):  # fetches an offloaded weight
        rows = tokens.to(head.weight.device)
        few = nn.Linear(head.in_features, len(rows), bias=head.bias is not None, device="meta")
        few.weight = nn.Parameter(head.weight[rows].to(device), requires_grad=False)
        if head.bias is not None:
            few.bias = nn.Parameter(head.bias[rows].to(device), requires_grad=False)
    setattr(parent, name, few)
    try:
        yield
    finally:
        setattr(parent, name, head)
