"""Completions of many prompts: greedy, steered, or sampled at a temperature."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dctlib.models.blocks import evaluation_mode, residual_width, tolerance, unwrap
from dctlib.models.chat import pad_id, tokenize_each
from dctlib.models.trace import once_per_model, probe_tokens
from dctlib.steering.hooks import as_rows, steer
from dctlib.steering.passes import unhooked


def generate_completions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    layer: int | None = None,
    vector: Float[Tensor, "*n d"] | ArrayLike | None = None,
    batch_size: int = 50,
    processor: LogitsProcessor | None = None,
    description: str = "completing",
    progress: bool = True,
) -> list[str]:
    """Generate a greedy completion of each text, steered by `vector` at `layer` if one is given.

    Greedy means the most likely token at every step, until an end token that the model's generation_config.json names.
    Everything else in that file is ignored: beams, penalties, forced or suppressed tokens, lengths and drafts.

    Parameters
    ----------
    model : nn.Module
        A language model, also inside PEFT, torch.compile or DataParallel. It runs in evaluation mode.
    texts : sequence of str
        Whole prompts (see :func:`dctlib.format_chat`).
    max_new_tokens : int
        Most tokens of a completion.
    layer : int, optional
        Where the vector is added, as in :func:`dctlib.steer`. Needed with `vector`.
    vector : Tensor or array, (d,) or (n, d), optional
        One for all texts, or one for each, at its own length.
    batch_size : int
        Texts of a batch are padded on the left and masked, so a completion does not depend on the other texts. This
        is verified once for each model. A model for which it does not hold runs the texts one by one.
    processor : LogitsProcessor, optional
        Changes the logits before the largest is taken.

    Returns
    -------
    list of str
        Only what was generated, without special tokens.

    Raises
    ------
    ValueError
        If a vector is given without a layer, there is neither one vector nor one for each text, or the model's logits
        are not a number.
    """
    vectors = None if vector is None else as_rows(vector, residual_width(model), name="vector")
    if vectors is not None and (layer is None or len(vectors) not in (1, len(texts))):
        raise ValueError(
            f"got layer={layer} and {len(vectors)} vectors for {len(texts)} texts, expected a layer, and one vector "
            f"for all texts or one for each"
        )
    tokenized = [row[0] for row in tokenize_each(tokenizer, texts)]
    pad = pad_id(tokenizer)
    adds_tokens = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    if adds_tokens or not batches_exactly(unwrap(model)):
        batch_size = 1
    completions = []
    with tqdm(total=len(texts), desc=description, disable=not progress) as bar:
        for first in range(0, len(texts), batch_size):
            rows = slice(first, first + batch_size)
            if vectors is None or layer is None:
                steered = nullcontext()
            else:
                steered = steer(model, layer=layer, vector=vectors if len(vectors) == 1 else vectors[rows])
            with steered, _greedy(model, tokenizer.eos_token_id, pad) as config:
                config.max_new_tokens = max_new_tokens
                answers = _generate(model, tokenized[rows], config, processor)
            completions += tokenizer.batch_decode(answers, skip_special_tokens=True)
            bar.update(len(answers))
    return completions


def _generate(
    model: Any, prompts: list[Int[Tensor, " t"]], config: GenerationConfig, processor: LogitsProcessor | None = None
) -> Any:
    """Return the new tokens after left-padded prompts, or the output object of ``generate`` if it returns one."""
    plain = unwrap(model)
    tokens = pad_sequence(prompts, batch_first=True, padding_value=config.pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    head = plain.get_output_embeddings()
    contiguous = nullcontext() if head is None else head.register_forward_pre_hook(_make_contiguous)
    with contiguous:
        output = getattr(model, "generate", plain.generate)(
            input_ids=tokens.to(plain.device),
            attention_mask=mask.to(plain.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Number(), *([processor] if processor else [])]),
        )
    return output[:, tokens.shape[1] :] if isinstance(output, Tensor) else output


@contextmanager
def _greedy(model: Any, end: Any, pad: int) -> Iterator[GenerationConfig]:
    """Let `model` generate greedily inside the context, with only the end tokens of its generation_config.

    If it names none, `end` is the end token. The model is in evaluation mode inside.
    """
    plain = unwrap(model)
    own = plain.generation_config
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else end
    config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=pad)
    # `generate` fills gaps in its argument from the model's own config, and PEFT keeps a second one.
    holders = [each for each in dict.fromkeys((plain, model)) if "generation_config" in vars(each)]
    before = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = config
        with evaluation_mode(plain):
            yield config
    finally:
        for holder, kept in zip(holders, before, strict=True):
            holder.generation_config = kept


@once_per_model
def batches_exactly(model: PreTrainedModel) -> bool:
    """Return whether a text gets the same logits padded in a batch as alone.

    In some families, positions count the padding, or a recurrent state carries it.

    Raises
    ------
    ValueError
        If the model does not generate at all.
    """
    long = probe_tokens(model)[0].cpu()
    short = long[-2:]
    with unhooked(model), _greedy(model, None, 0) as config:
        config.max_new_tokens, config.eos_token_id = 2, None
        config.output_logits = config.return_dict_in_generate = True
        try:
            alone = torch.cat(_generate(model, [short], config).logits)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(f"{type(model).__name__} does not generate from a few tokens: {error}") from error
        try:
            together = torch.stack(_generate(model, [long, short], config).logits)[:, 1]
        except ValueError:  # not a number behind padding, as under eager attention in float64
            return False
    return bool((together - alone).norm() <= tolerance(model.dtype) * alone.norm())


class _Number(LogitsProcessor):
    """Raise ValueError for logits that are not a number, because none is then the largest."""

    def __call__(self, input_ids: Int[Tensor, "batch t"], scores: Float[Tensor, "batch v"]) -> Float[Tensor, "batch v"]:
        if scores.isnan().any():
            raise ValueError(
                "the model's logits are not a number: its weights may be damaged, or a block may overflow; try "
                "dtype='float32', or shorter vectors"
            )
        return scores


def _make_contiguous(_head: nn.Module, args: tuple) -> tuple:
    # On a CPU, torch's matmul copies the head's weights for every strided row, half of a completion's time.
    return (args[0].contiguous(), *args[1:]) if args else args


def generate_per_vector(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    vectors: Float[Tensor, "k d"] | ArrayLike,
    *,
    layer: int,
    max_new_tokens: int,
    progress: bool = True,
) -> list[list[str]]:
    """Return greedy completions of every text under each vector: k lists, each in the order of `texts`."""
    vectors = as_rows(vectors, residual_width(model), name="vector")
    completions = generate_completions(
        model,
        tokenizer,
        [*texts] * len(vectors),
        max_new_tokens=max_new_tokens,
        layer=layer,
        vector=vectors.repeat_interleave(len(texts), 0),
        progress=progress,
    )
    return _in_lists(completions, len(texts))


class _GumbelNoise(LogitsProcessor):
    """Logits over T plus Gumbel noise, whose largest is a sample of softmax(logits / T)."""

    def __init__(self, temperature: float, seed: int):
        self._temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Int[Tensor, "batch t"], scores: Float[Tensor, "batch v"]) -> Float[Tensor, "batch v"]:
        exponential = torch.empty(scores.shape).exponential_(generator=self._generator).to(scores.device)
        return scores.float() / self._temperature - exponential.log()


def sample_completions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    count: int,
    temperature: float = 1.0,
    max_new_tokens: int,
    seed: int = 0,
    progress: bool = True,
) -> list[list[str]]:
    """Return `count` sampled completions of every text: `count` lists, each in the order of `texts`.

    Parameters
    ----------
    temperature : float
        1 for the model's own distribution.
    seed : int
        On one machine, the same seed gives the same completions.

    Raises
    ------
    ValueError
        If there is no text, or the count or temperature is not above 0.
    """
    if isinstance(texts, str) or not texts or count < 1 or not temperature > 0:
        raise ValueError(
            f"got {len(texts)} texts, count={count}, temperature={temperature}, expected a list and both above 0"
        )
    completions = generate_completions(
        model,
        tokenizer,
        [*texts] * count,
        max_new_tokens=max_new_tokens,
        processor=_GumbelNoise(temperature, seed),
        description="sampling",
        progress=progress,
    )
    return _in_lists(completions, len(texts))


def _in_lists(completions: list[str], n: int) -> list[list[str]]:
    return [completions[first : first + n] for first in range(0, len(completions), n)]
