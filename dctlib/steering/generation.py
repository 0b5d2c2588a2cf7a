"""Completions of many prompts: greedy, steered, or sampled at a temperature."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from dctlib.models.chat import pad_id, tokenize_each
from dctlib.steering.hooks import steer


def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    layer: int | None = None,
    vector: Float[Tensor, "*n d"] | None = None,
    batch_size: int = 50,
    processor: LogitsProcessor | None = None,
    description: str = "completing",
    progress: bool = True,
) -> list[str]:
    """Continue each text greedily, steered by `vector` at `layer` if one is given.

    Parameters
    ----------
    vector : Tensor, (d,) or (n, d), optional
        One for all texts, or one for each.
    batch_size : int
        Texts of a batch are padded on the left and masked, so a completion does not depend on its neighbours.
    processor : LogitsProcessor, optional
        What changes the logits before the largest is taken.

    Returns
    -------
    list of str
        Only what was generated, without special tokens.

    Raises
    ------
    ValueError
        If a vector comes without a layer, or their number is not that of the texts.
    """
    if vector is not None and (layer is None or (vector.ndim == 2 and len(vector) != len(texts))):
        raise ValueError(
            f"got layer={layer} and vectors of shape {tuple(vector.shape)} for {len(texts)} texts, expected a layer, "
            f"and one vector for all texts or one for each"
        )
    tokenized = [row[0] for row in tokenize_each(tokenizer, texts)]
    pad, generate = pad_id(tokenizer), cast(Any, model.generate)
    options: Any = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad}
    options["repetition_penalty"] = 1.0  # many models ship another, which greedy decoding would heed
    if processor:
        options["logits_processor"] = [processor]
    completions = []
    with tqdm(total=len(texts), desc=description, disable=not progress) as bar:
        for first in range(0, len(texts), batch_size):
            rows = slice(first, first + batch_size)
            prompts = tokenized[rows]
            tokens = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left")
            real = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
            inputs = {"input_ids": tokens.to(model.device), "attention_mask": real.to(model.device)}
            if vector is None or layer is None:
                steered = nullcontext()
            else:
                steered = steer(model, layer=layer, vector=vector if vector.ndim == 1 else vector[rows])
            with steered, _contiguous_head(model):
                output = generate(**inputs, **options)
            answers = output[:, tokens.shape[1] :]
            completions += tokenizer.batch_decode(answers, skip_special_tokens=True)
            bar.update(len(answers))
    return completions


@contextmanager
def _contiguous_head(model: PreTrainedModel) -> Iterator[None]:
    """Copy the last position's residuals before the output head reads them.

    They come as a view with strides, for which torch's matmul on a CPU copies the head's weights once for every row:
    gigabytes, and half the time of a short completion.
    """
    head: Any = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def generate_per_vector(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    vectors: Float[Tensor, "k d"],
    *,
    layer: int,
    max_new_tokens: int,
    progress: bool = True,
) -> list[list[str]]:
    """Continue every text under each vector: k lists of completions, each in the order of `texts`."""
    n, repeated = len(texts), [*texts] * len(vectors)
    steering: Any = {"layer": layer, "vector": vectors.repeat_interleave(n, 0)}
    said = generate_completions(
        model, tokenizer, repeated, max_new_tokens=max_new_tokens, progress=progress, **steering
    )
    return [said[first : first + n] for first in range(0, len(said), n)]


class _Gumbel(LogitsProcessor):
    """The largest of logits / T plus Gumbel noise is a sample of softmax(logits / T), so greedy decoding samples."""

    def __init__(self, temperature: float, seed: int):
        self._temperature, self._generator = temperature, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Int[Tensor, "batch t"], scores: Float[Tensor, "batch v"]) -> Float[Tensor, "batch v"]:
        exponential = torch.empty(scores.shape).exponential_(generator=self._generator).to(scores.device)
        return scores.float() / self._temperature - exponential.log()


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    count: int,
    temperature: float = 1.0,
    max_new_tokens: int,
    seed: int = 0,
    progress: bool = True,
) -> list[list[str]]:
    """Draw `count` completions of every text: a list of `count` lists, each in the order of `texts`.

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
    options: Any = {"processor": _Gumbel(temperature, seed), "description": "sampling", "progress": progress}
    drawn = generate_completions(model, tokenizer, [*texts] * count, max_new_tokens=max_new_tokens, **options)
    return [drawn[first : first + len(texts)] for first in range(0, len(drawn), len(texts))]
