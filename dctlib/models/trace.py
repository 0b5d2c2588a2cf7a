"""One run of a model on a few tokens, with every module's input and output: how a layout is found and verified."""

import itertools
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dctlib.models.blocks import eager_attention, get_blocks, output_residual, residual_width, split_residual, unwrap

_PROBE_TOKENS = 6

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module.

    Attributes
    ----------
    path : str
        The module's name in the model.
    module : nn.Module
        The module.
    start, end : int
        When the call began and ended, on one clock for all calls.
    input, output : Tensor or None
        Copies of the first tensor that went in and of the first that came out.
    """

    path: str
    module: nn.Module
    start: int
    end: int
    input: Tensor | None
    output: Tensor | None


@dataclass(frozen=True, eq=False)
class Trace:
    """All calls of one run, in the order in which they began.

    Attributes
    ----------
    calls : list of Call
        Calls of every module below the model itself.
    blocks : list of Call
        The call of each block, in the order of the blocks.
    inputs : list of Tensor, (1, tokens, d)
        The residual stream that each block works on: what it was called with, after hooks such as those of
        :func:`dctlib.steer`.
    logits : Tensor, (1, tokens, vocabulary)
        What the model returned.
    """

    calls: list[Call]
    blocks: list[Call]
    inputs: list[Float[Tensor, "1 t d"]]
    logits: Float[Tensor, "1 t v"]

    @property
    def residuals(self) -> list[Float[Tensor, "1 t d"]]:
        """h_0 … h_blocks. Of a model on several devices, each is where its block lies."""
        return [*self.inputs, output_residual(self.blocks[-1].output)]


def probe_tokens(model: PreTrainedModel) -> Int[Tensor, "1 t"]:
    """Return a few ordinary token ids, spread over the first of the vocabulary, none named in the configuration."""
    settings = [model.config.to_dict(), model.config.get_text_config().to_dict()]
    named = {value for each in settings for name, value in each.items() if "token" in name and isinstance(value, int)}
    size = model.config.get_text_config().vocab_size
    ordinary = [token for token in range(min(size, 4 * _PROBE_TOKENS + len(named))) if token not in named]
    spread = [ordinary[(i + 1) * len(ordinary) // (_PROBE_TOKENS + 2)] for i in range(_PROBE_TOKENS)]
    return torch.tensor([spread], device=model.device)


def trace_model(model: PreTrainedModel) -> Trace:
    """Run `model` on its probe tokens and return every call.

    Raises
    ------
    ValueError
        If blocks do not run once each, in order, on one residual stream, or the model cannot run on token ids alone.
    """
    blocks = list(get_blocks(model))
    paths = {module: path for path, module in model.named_modules() if path}
    clock = itertools.count()
    started: dict[nn.Module, list[tuple[int, Tensor | None]]] = defaultdict(list)
    calls: list[Call] = []
    inputs: list[Tensor] = []

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        started[module].append((next(clock), _copy(_first_tensor([*args, *kwargs.values()]))))

    def keep_input(_block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs.append(split_residual(args, kwargs)[0].detach().clone())

    def finish(module: nn.Module, _args: tuple, output: Any) -> None:
        start, arrived = started[module].pop()
        calls.append(Call(paths[module], module, start, next(clock), arrived, _copy(_first_tensor(output))))

    with ExitStack() as hooks, torch.no_grad(), eager_attention(model), torch.compiler.set_stance("force_eager"):
        for module in paths:
            hooks.enter_context(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(finish))
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(keep_input, with_kwargs=True))
        try:
            logits = model(input_ids=probe_tokens(model), use_cache=False).logits
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} does not run on a few token ids alone, expected a language model of text: "
                f"{error}"
            ) from error
    calls.sort(key=lambda call: call.start)
    ran = [call for call in calls if call.module in set(blocks)]
    width = (*probe_tokens(model).shape, residual_width(model))
    if [call.module for call in ran] != blocks or any(hidden.shape != width for hidden in inputs):
        raise ValueError(
            f"the blocks of {type(model).__name__} do not run one after another, once each, on one residual stream"
        )
    return Trace(calls, ran, inputs, logits)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _first_tensor(output: Any) -> Tensor | None:
    """Return a tensor, or the first one of a tuple or of a model's output."""
    if isinstance(output, Tensor):
        return output
    values = output if isinstance(output, (tuple, list)) else getattr(output, "values", tuple)()
    return next((value for value in values if isinstance(value, Tensor)), None)


def once_per_model(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Remember what a function of a model and plain values returned, for as long as the model's modules stay.

    Weights may change in between, so `function` must depend on the layout alone.
    """
    known: WeakKeyDictionary[nn.Module, dict[tuple, Any]] = WeakKeyDictionary()

    @wraps(function)
    def remembered(*args: Any, **kwargs: Any) -> Any:
        model = unwrap(args[0])
        key = (tuple(map(id, model.modules())), args[1:], tuple(sorted(kwargs.items())))
        results = known.setdefault(model, {})
        if key not in results:
            results[key] = function(model, *args[1:], **kwargs)  # pyright: ignore[reportCallIssue]
        return results[key]

    return remembered  # pyright: ignore[reportReturnType]
