"""Watch a model's passes inside a context: run them eagerly, check that hooks fire, and locate their tokens."""

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dctlib.models.blocks import get_blocks, get_holders, unwrap

_CACHE_NAMES = ("past_key_values", "cache_params", "past_key_value", "layer_past", "state", "mems")


def is_watched(model: Any) -> bool:
    """Return whether `model` is inside a context of :func:`watch_passes`."""
    return any(
        getattr(hook, "__module__", "") == __name__ for hook in get_holders(model)[-1]._forward_pre_hooks.values()
    )


@contextmanager
def unhooked(model: Any) -> Iterator[None]:
    """Take the hooks of :func:`dctlib.steer` and :func:`dctlib.ablate` off `model` inside the context."""
    tables = [hooks for part in unwrap(model).modules() for hooks in (part._forward_pre_hooks, part._forward_hooks)]
    before = [dict(hooks) for hooks in tables]
    try:
        for hooks in tables:
            for key, hook in list(hooks.items()):
                if getattr(hook, "__module__", "").startswith("dctlib.steering."):
                    del hooks[key]
        yield
    finally:
        for hooks, kept in zip(tables, before, strict=True):
            hooks.clear()
            hooks.update(kept)


def devices_of(model: Any) -> int:
    """Return over how many devices a wrapper splits each batch."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    return len(model.device_ids) if isinstance(model, nn.DataParallel) else 1


@dataclass
class _Generation:
    """One call of ``generate``: its prompts, and the tokens that its next pass must run.

    Attributes
    ----------
    prompts, expansion : int
        Rows that it was given, and how many times it repeats each, for beams or several answers.
    prompt_tokens : int
        Tokens of the prompt, padding included. 0 until it is known.
    inputs : Tensor or None
        Tokens or embeddings prepared for the next pass.
    length : int
        Tokens of the sequence so far, including `inputs`.
    """

    prompts: int = 0
    expansion: int = 1
    prompt_tokens: int = 0
    inputs: Tensor | None = None
    length: int = 0


class Passes:
    """What a hook may ask about the pass that it runs in."""

    def __init__(self) -> None:
        self._generation: _Generation | None = None
        self._expected = False  # whether generate prepared the pass that runs
        self._past: int | None = None  # tokens before those of the pass; None outside one, -1 if not known
        self._packed = False  # whether the mask is not (batch, tokens), as for several prompts packed in one row

    def match_rows(self, rows: Tensor, batch: int, *, name: str) -> Tensor:
        """Return one of `rows` for each row of a batch, or a single one for all.

        If ``generate`` repeats each prompt, for beams or several answers, its row is repeated as often. Beams only
        change places with beams of the same prompt.

        Raises
        ------
        ValueError
            If the batch has another number of rows.
        """
        generation = self._generation or _Generation()
        if len(rows) == 1:
            return rows
        if len(rows) == generation.prompts and batch == len(rows) * generation.expansion:
            return rows.repeat_interleave(generation.expansion, 0)
        if len(rows) == batch and generation.expansion == 1:
            return rows
        repeated = f", which generate repeated {generation.expansion} times" if generation.expansion > 1 else ""
        raise ValueError(
            f"got {len(rows)} {name} for a batch of {batch // generation.expansion} rows{repeated}, expected one a row"
        )

    def place(self, tokens: int) -> tuple[int, int]:
        """Return where the `tokens` of this pass begin in their sequence, and how many of them belong to the prompt.

        Outside ``generate``, a pass without a past is a prompt, and a single token behind a past is generated.

        Raises
        ------
        ValueError
            If that is not known.
        """
        generation, past = self._generation, self._past
        if past is None:
            raise ValueError("a block ran outside its model, so its tokens are not known; leave positions='all'")
        if generation is None:
            if past == 0 or (past > 0 and tokens == 1):
                return past, 0 if past else tokens
            raise ValueError(
                f"got a pass of {tokens} tokens behind a past, which may be prompt or generated; call generate(), or "
                f"leave positions='all'"
            )
        if past < 0 and generation.length >= generation.prompt_tokens:
            past = generation.length - tokens
        if not self._expected or past < 0:
            raise ValueError(
                "generate ran a pass of tokens that it did not prepare, as guidance_scale and prompt tuning do, so "
                "prompt and answer cannot be told apart; leave positions='all'"
            )
        return past, min(max(generation.prompt_tokens - past, 0), tokens)

    def select(self, positions: str | Bool[Tensor, "rows prompt"], hidden: Tensor) -> Bool[Tensor, "rows tokens"]:
        """Return which tokens of `hidden`, (batch, tokens, d), `positions` selects in this pass."""
        tokens = hidden.shape[1]
        first, of_prompt = self.place(tokens)
        is_prompt = (torch.arange(tokens, device=hidden.device) < of_prompt)[None]
        if isinstance(positions, str):
            return is_prompt if positions == "prompt" else ~is_prompt
        if self._packed and not self._generation:
            raise ValueError("got a mask of positions for prompts that are packed in one row; run them one by one")
        width = self._generation.prompt_tokens if self._generation else of_prompt
        if of_prompt and positions.shape[1] != width:
            raise ValueError(f"got a mask of {positions.shape[1]} positions for a prompt of {width} tokens")
        rows = self.match_rows(positions.to(hidden.device), len(hidden), name="masks")
        chosen = rows[:, first : first + of_prompt]
        return nn.functional.pad(chosen, (0, tokens - of_prompt))

    def _note_inputs(self, _model: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        generation = self._generation
        given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        self._expected = generation is not None and any(
            inputs is not None and inputs is generation.inputs for inputs in given
        )

    def _note_past(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**inspect.signature(stack.forward).bind_partial(*args, **kwargs).arguments, **kwargs}
        mask = given.get("attention_mask")
        self._packed = mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)
        caches = [
            value
            for name, value in given.items()
            if value is not None
            and (name in _CACHE_NAMES or (hasattr(value, "update") and not isinstance(value, dict)))
        ]
        try:
            self._past = int(caches[0].get_seq_length()) if caches else 0
        except (AttributeError, ValueError):  # a recurrent state does not count its tokens
            self._past = -1

    def _forget_past(self, _stack: nn.Module, _args: tuple, _output: Any) -> None:
        self._past = None

    @contextmanager
    def follow_generate(self, plain: Any) -> Iterator[None]:
        """Note the prompts, the repetitions and the next tokens of every ``generate`` of `plain`."""
        names = ("generate", "_expand_inputs_for_generation", "prepare_inputs_for_generation", "heal_tokens")
        own = {name: vars(plain).get(name) for name in names}
        methods: list[Any] = [getattr(plain, name, None) for name in names]
        run, expand, prepare, _ = methods

        def follow_run(*args: Any, **kwargs: Any) -> Any:
            outer = self._generation
            mask = kwargs.get("attention_mask")
            # If this model is its own draft model, it generates inside a call; the prompt stays that of the outer call.
            known = outer.prompt_tokens if outer else 0
            generation = _Generation(prompt_tokens=known, length=0 if mask is None else mask.shape[1])
            self._generation = generation
            try:
                result = run(*args, **kwargs)
            finally:
                self._generation = outer
            if not generation.prompts:
                raise ValueError(
                    "generate kept its prompts to itself, as with continuous batching, so rows and positions are not "
                    "known; steer by one vector at all positions"
                )
            return result

        def follow_expand(*args: Any, **kwargs: Any) -> Any:
            given = {**inspect.signature(expand).bind(*args, **kwargs).arguments, **kwargs}
            inputs = [each for name in ("input_ids", "inputs_embeds") if (each := given.get(name)) is not None]
            if (generation := self._generation) is not None and inputs:
                generation.prompts, generation.expansion = len(inputs[0]), given.get("expand_size", 1)
                widths = [each.shape[1] for each in inputs]
                generation.prompt_tokens = generation.prompt_tokens or max(*widths, generation.length)
            return expand(*args, **kwargs)

        def follow_prepare(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            prepared = prepare(input_ids, *args, **kwargs)
            if (generation := self._generation) is not None:
                tokens, embeddings = prepared.get("input_ids"), prepared.get("inputs_embeds")
                generation.inputs = embeddings if tokens is None else tokens
                generation.length = input_ids.shape[1]
            return prepared

        def refuse_healing(*_args: Any, **_kwargs: Any) -> Any:
            raise ValueError("token_healing rewrites the end of a prompt, so its length is not known; leave it out")

        followers = (follow_run, follow_expand, follow_prepare, refuse_healing)
        replaced: dict[str, Any] = {
            name: functools.wraps(method)(follower)
            for name, method, follower in zip(names, methods, followers, strict=True)
            if method is not None  # a model without an output head generates nothing
        }
        for name, method in replaced.items():
            method.below, method.ended = own[name], False
        vars(plain).update(replaced)
        try:
            yield
        finally:
            for name, method in replaced.items():
                method.ended = True
                top = vars(plain).pop(name, None)
                while getattr(top, "ended", False):  # contexts may end in any order
                    top = top.below
                if top is not None:
                    vars(plain)[name] = top


@contextmanager
def watch_passes(model: Any, sites: Sequence[nn.Module], *, follow: bool = False) -> Iterator[Passes]:
    """Run `model` eagerly inside the context, and require that every pass of it calls `sites`, whose hooks then fire.

    torch.compile runs what it compiled before a hook was added, and would keep a hook that has been removed
    (pytorch#117758). So compiled parts run uncompiled here, and as before afterwards.

    Parameters
    ----------
    sites : sequence of nn.Module
        Modules that carry hooks.
    follow : bool
        Whether hooks need :meth:`Passes.match_rows` for the prompts of ``generate``, or :meth:`Passes.select`.

    Raises
    ------
    ValueError
        If a pass ends without a call of each site, as with a CUDA graph or an exported program. The exception comes
        out of the pass. Gradient checkpointing is refused, because it runs blocks again in the backward pass.
    """
    plain, blocks = unwrap(model), get_blocks(model)
    holders = get_holders(model)
    stack = holders[-1]
    forwards = {module: module.forward for module in holders}
    clock = 0
    begun: dict[int, int] = {}
    called: dict[nn.Module, int] = {}

    def begin(module: nn.Module, _args: tuple) -> None:
        nonlocal clock
        clock += 1
        begun[id(module)] = clock
        checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in (stack, *blocks))
        if checkpointed and stack.training and torch.is_grad_enabled():
            raise ValueError(
                "gradient checkpointing runs blocks again in the backward pass, where the hooks may be gone; call "
                "model.gradient_checkpointing_disable() or model.eval()"
            )

    def call(site: nn.Module, _replica: nn.Module, _args: tuple) -> None:
        called[site] = clock

    def end(module: nn.Module, _args: tuple, _output: Any) -> None:
        if any(holder.forward != forward for holder, forward in forwards.items()):
            return  # replaced inside the context, as to compute logits of a residual alone
        skipped = blocks[plain.config.get_text_config().num_hidden_layers :]  # a draft runs the first blocks alone
        unused = {part for block in skipped for part in block.modules()}
        missing = [site for site in sites if called.get(site, 0) < begun[id(module)] and site not in unused]
        if missing:
            raise ValueError(
                f"{type(module).__name__} ran without {len(missing)} of {len(sites)} hooks, the first on a "
                f"{type(missing[0]).__name__}: a CUDA graph, an exported program or layer drop left them out; use "
                f"the model without it"
            )

    manager = "_cached_continuous_batching_manager"
    if hasattr(plain, manager):
        raise ValueError(
            "continuous batching keeps states and graphs of earlier passes; call "
            "model.destroy_cached_continuous_batching_manager() first"
        )
    passes = Passes()
    with ExitStack() as exits:
        exits.callback(lambda: hasattr(plain, manager) and plain.destroy_cached_continuous_batching_manager())
        exits.enter_context(torch.compiler.set_stance("force_eager"))
        for site in sites:
            exits.enter_context(site.register_forward_pre_hook(functools.partial(call, site)))
        for module in {id(module): module for module in (model, plain, stack)}.values():
            exits.enter_context(module.register_forward_pre_hook(begin, prepend=True))
            exits.enter_context(module.register_forward_hook(end))
        if follow:
            exits.enter_context(plain.register_forward_pre_hook(passes._note_inputs, with_kwargs=True))
            exits.enter_context(stack.register_forward_pre_hook(passes._note_past, with_kwargs=True))
            exits.enter_context(stack.register_forward_hook(passes._forget_past, always_call=True))
            exits.enter_context(passes.follow_generate(plain))
        yield passes
