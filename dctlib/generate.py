"""Greedy completions of many prompts."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from dctlib.intervene import steer
from dctlib.models import pad_id
from dctlib.prompts import has_bos


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    layer: int | None = None,
    vector: Float[Tensor, "*n d"] | None = None,
    batch_size: int = 25,
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
    completions = []
    bar = tqdm(total=len(texts), desc=description, disable=not progress)
    for inputs in padded_batches(model, tokenizer, texts, batch_size):
        count = len(inputs["input_ids"])
        if vector is None or layer is None:
            steered = nullcontext()
        else:
            rows = slice(len(completions), len(completions) + count)
            steered = steer(model, layer=layer, vector=vector if vector.ndim == 1 else vector[rows])
        with steered:
            output = next_tokens(model, tokenizer, inputs, max_new_tokens)
        answers = output.sequences[:, inputs["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(answers, skip_special_tokens=True)
        bar.update(count)
    bar.close()
    return completions


def next_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: BatchEncoding, count: int, **output: bool
) -> Any:
    """Generate `count` tokens greedily. Positions follow the mask, as in a plain forward pass they do not."""
    generate: Any = model.generate
    return generate(
        **inputs,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=pad_id(tokenizer),
        return_dict_in_generate=True,
        **output,
    )


def padded_batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int
) -> Iterator[BatchEncoding]:
    """Batches of `texts` in order, padded on the left, with masks, on the model's device."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"got texts={texts!r}, expected at least one prompt in a list")
    special = not has_bos(tokenizer, texts[0])
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        yield tokenizer(batch, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=special).to(
            model.device
        )
