"""Greedy completions of many prompts, steered or not."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dctlib.models.blocks import adds_tokens, evaluation_mode, has_hooks, residual_width, tolerance, unwrap
from dctlib.models.chat import pad_id, tokenize_each
from dctlib.models.packing import check_vocabulary, ordinary_tokens, reaches, vocabulary_size
from dctlib.models.trace import once_per_model, probe_tokens
from dctlib.steering.hooks import as_rows, steer
from dctlib.steering.passes import unhooked

_SHARED = 8  # least tokens of a shared beginning that are worth a pass of their own


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
        Texts of a batch are padded and masked, and a beginning that they share runs once. A completion does not depend
        on the other texts. This is verified once for each model. A model for which padding changes an answer runs the
        texts one by one.
    processor : LogitsProcessor, optional
        Changes the logits before the largest is taken.

    Returns
    -------
    list of str
        Only what was generated, without special tokens.

    Raises
    ------
    ValueError
        If a vector is given without a layer, there is neither one vector nor one for each text, an option is below 1,
        a token has no embedding, or the model's logits are not a number.
    """
    vectors = None if vector is None else as_rows(vector, residual_width(model), name="vector")
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"got batch_size={batch_size}, max_new_tokens={max_new_tokens}, expected at least 1")
    if vectors is not None and (layer is None or len(vectors) not in (1, len(texts))):
        raise ValueError(
            f"got layer={layer} and {len(vectors)} vectors for {len(texts)} texts, expected a layer, and one vector "
            f"for all texts or one for each"
        )
    tokenized = [row[0] for row in tokenize_each(tokenizer, texts)]
    check_vocabulary(model, torch.cat(tokenized).unique().tolist())
    pad = pad_id(tokenizer)
    pad = pad if pad < vocabulary_size(model) else 0  # it is masked and cut off
    if adds_tokens(model) or not batches_exactly(unwrap(model)):
        batch_size = 1
    alone = adds_tokens(model) or min(batch_size, len(texts)) == 1
    shared = 0 if alone else _shared_beginning(model, tokenized, max_new_tokens)

    def steered(rows: Float[Tensor, "k d"] | None) -> AbstractContextManager[None]:
        return nullcontext() if rows is None or layer is None else steer(model, layer=layer, vector=rows)

    completions = []
    with tqdm(total=len(texts), desc=description, disable=not progress) as bar:
        for first in range(0, len(texts), batch_size):
            rows = slice(first, first + batch_size)
            prompts = tokenized[rows]
            of_rows = vectors if vectors is None or len(vectors) == 1 else vectors[rows]
            different, kinds = _distinct(of_rows, len(prompts))
            with _greedy(model, tokenizer.eos_token_id, pad) as config:
                beginning = None
                if shared and kinds.max() + 1 < len(prompts):
                    with steered(different):
                        beginning = _begin(model, prompts[0][:shared], kinds, config)
                config.max_new_tokens = max_new_tokens
                with steered(of_rows):
                    answers = _generate(model, prompts, config, processor, beginning)
            for answer in answers:
                said = _until_end(answer, config.eos_token_id)  # what follows is padding
                completions.append(str(tokenizer.decode(said, skip_special_tokens=True)))
            bar.update(len(answers))
    return completions


def _until_end(tokens: Int[Tensor, " t"], ends: int | list[int] | None) -> Int[Tensor, " t"]:
    """Return the tokens up to the first end token, with it."""
    if ends is None:
        return tokens
    found = torch.isin(tokens, torch.as_tensor(ends, device=tokens.device)).nonzero()
    return tokens[: int(found[0]) + 1] if len(found) else tokens


def _distinct(
    vectors: Float[Tensor, "n d"] | None, count: int
) -> tuple[Float[Tensor, "k d"] | None, Int[Tensor, " count"]]:
    """Return the different ones of a batch's vectors, and the number of each row's; None and one are for all rows."""
    if vectors is None or len(vectors) == 1:
        return vectors, torch.zeros(count, dtype=torch.long)
    different, kinds = vectors.unique(dim=0, return_inverse=True)
    return different, kinds.cpu()  # which index caches on any device


def _begin(
    model: Any, tokens: Int[Tensor, " t"], kinds: Int[Tensor, " rows"], config: GenerationConfig
) -> Cache | None:
    """Return the cache of a beginning that prompts share, in one row each; it runs once for each kind of row.

    It is None if the model keeps no cache.
    """
    config.max_new_tokens, config.return_dict_in_generate = 1, True
    try:
        beginning = _generate(model, [tokens] * (int(kinds.max()) + 1), config).past_key_values
    finally:
        config.return_dict_in_generate = False
    if beginning is not None:
        beginning.batch_select_indices(kinds)
    return beginning


def _generate(
    model: Any,
    prompts: list[Int[Tensor, " t"]],
    config: GenerationConfig,
    processor: LogitsProcessor | None = None,
    beginning: Cache | None = None,
) -> Any:
    """Return the new tokens after prompts, or the output object of ``generate`` if it returns one.

    Padding stands left of the prompts or, if their `beginning` was run before, between it and the rest.
    """
    plain = unwrap(model)
    shared = 0 if beginning is None else beginning.get_seq_length()
    left: Any = {"batch_first": True, "padding_side": "left"}
    rests = [prompt[shared:] for prompt in prompts]
    tokens = pad_sequence(rests, padding_value=config.pad_token_id, **left)
    mask = pad_sequence([torch.ones_like(rest) for rest in rests], **left)
    past = {}
    if beginning is not None:
        start = prompts[0][:shared].expand(len(prompts), -1)
        tokens, mask = torch.cat([start, tokens], 1), torch.cat([torch.ones_like(start), mask], 1)
        past = {"past_key_values": beginning}
    head = plain.get_output_embeddings()
    contiguous = nullcontext() if head is None else head.register_forward_pre_hook(_make_contiguous)
    with contiguous:
        output = getattr(model, "generate", plain.generate)(
            input_ids=tokens.to(plain.device),
            attention_mask=mask.to(plain.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Number(), *([processor] if processor else [])]),
            **past,
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
        config.eos_token_id, config.output_logits = None, True
        try:
            (alone,) = _first_logits(model, [short], config)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(f"{type(model).__name__} does not generate from a few tokens: {error}") from error
        try:
            _, together = _first_logits(model, [long, short], config)
        except ValueError:  # not a number behind padding, as under eager attention in float64
            return False
    return bool((together - alone).norm() <= tolerance(model.dtype) * alone.norm())


def _shared_beginning(model: Any, prompts: Sequence[Int[Tensor, " t"]], max_new_tokens: int) -> int:
    """Return the number of first tokens that prompts share and that run once for all of them; 0 for none.

    The caller's hooks see every token of every prompt, so nothing is shared while there are any. Padding behind the
    beginning moves it further away, so every window of the model's attention must hold all tokens.
    """
    plain = unwrap(model)
    shortest, longest = (choose(prompts, key=len) for choose in (min, max))
    stacked = torch.stack([prompt[: len(shortest) - 1] for prompt in prompts])
    differs = (stacked != stacked[0]).any(0).nonzero()
    shared = int(differs[0]) if len(differs) else stacked.shape[1]
    within = len(longest) + max_new_tokens <= min(reaches(plain), default=math.inf)
    return shared if shared >= _SHARED and within and not has_hooks(plain) and resumes_exactly(plain) else 0


@once_per_model
def resumes_exactly(model: PreTrainedModel) -> bool:
    """Return whether texts get the same logits if their beginning was run before, with or without padding behind it.

    Errors are compared with the change that another text makes. The rows of a beginning are repeated in the check, as
    a model may also keep something of each row elsewhere.
    """
    start, *rests = ordinary_tokens(model, 4, 16, 2, 2)
    texts = [torch.tensor(start + rest) for rest in rests]
    errors = []
    with unhooked(model), _greedy(model, None, 0) as config:
        config.eos_token_id, config.output_logits = None, True
        try:
            alone = [_first_logits(model, [text], config)[0] for text in texts]
            for rows in ([0, 1, 2], [1, 2, 2]):
                beginning = _begin(model, texts[0][: len(start)], torch.tensor([0, 1, 1]), config)
                if beginning is None:
                    return False
                found = _first_logits(model, [texts[row] for row in rows], config, beginning)
                errors += [(each - alone[row]).norm() for each, row in zip(found, rows, strict=True)]
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a family's cache raises
            return False
    return bool(max(errors) <= tolerance(model.dtype) * (alone[1] - alone[2]).norm())


def _first_logits(
    model: Any, prompts: list[Int[Tensor, " t"]], config: GenerationConfig, beginning: Cache | None = None
) -> Float[Tensor, "n steps v"]:
    """Return the logits of the first two new tokens."""
    config.max_new_tokens, config.return_dict_in_generate = 2, True
    return torch.stack(_generate(model, prompts, config, beginning=beginning).logits, 1)


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
    return in_lists(completions, len(texts))


def in_lists(completions: list[str], n: int) -> list[list[str]]:
    """Return lists of n each."""
    return [completions[first : first + n] for first in range(0, len(completions), n)]
