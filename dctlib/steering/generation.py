"""Completions of many prompts: greedy, steered, or sampled at a temperature."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

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
    """Generate a greedy completion of each text, steered by `vector` at `layer` if one is given.

    Greedy means one beam, no sampling and no repetition penalty, whatever the model's generation_config.json says.

    Parameters
    ----------
    vector : Tensor, (d,) or (n, d), optional
        One for all texts, or one for each.
    batch_size : int
        Texts of a batch are padded on the left and masked, so a completion does not depend on the other texts.
    processor : LogitsProcessor, optional
        Changes the logits before the largest is taken.

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
    pad = pad_id(tokenizer)
    generate: Any = model.generate
    head: Any = model.get_output_embeddings()
    completions = []
    with tqdm(total=len(texts), desc=description, disable=not progress) as bar:
        for first in range(0, len(texts), batch_size):
            rows = slice(first, first + batch_size)
            prompts = tokenized[rows]
            tokens = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left")
            mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
            if vector is None or layer is None:
                steered = nullcontext()
            else:
                steered = steer(model, layer=layer, vector=vector if vector.ndim == 1 else vector[rows])
            with steered, head.register_forward_pre_hook(_make_contiguous):
                output = generate(
                    input_ids=tokens.to(model.device),
                    attention_mask=mask.to(model.device),
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad,
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,
                    logits_processor=LogitsProcessorList([processor] if processor else []),
                )
            completions += tokenizer.batch_decode(output[:, tokens.shape[1] :], skip_special_tokens=True)
            bar.update(len(prompts))
    return completions


def _make_contiguous(_head: torch.nn.Module, args: tuple) -> tuple:
    # torch's matmul on a CPU copies the head's weights once for every strided row: half the time of a completion.
    return (args[0].contiguous(), *args[1:])


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
    """Return greedy completions of every text under each vector: k lists, each in the order of `texts`."""
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
