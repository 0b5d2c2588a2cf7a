"""Greedy completions of many prompts."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    vector: Float[Tensor, " d"] | None = None,
    batch_size: int = 25,
    description: str = "completing",
    progress: bool = True,
) -> list[str]:
    """Continue each text greedily, steered by `vector` at `layer` if one is given.

    Prompts of a batch are padded on the left and masked, so a completion does not depend on its neighbours.

    Returns
    -------
    list of str
        Only what was generated, without special tokens.
    """
    completions = []
    generate: Any = model.generate
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        with ExitStack() as interventions:
            if vector is not None:
                interventions.enter_context(steer(model, layer=layer, vector=vector))  # pyright: ignore[reportArgumentType]
            starts = range(0, len(texts), batch_size)
            for start in tqdm(starts, desc=description, disable=not progress):
                batch = list(texts[start : start + batch_size])
                bos = has_bos(tokenizer, batch[0])
                inputs = tokenizer(batch, return_tensors="pt", padding=True, add_special_tokens=not bos)
                output = generate(
                    **inputs.to(model.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=pad_id(tokenizer),
                )
                answers = output[:, inputs["input_ids"].shape[1] :]
                completions += tokenizer.batch_decode(answers, skip_special_tokens=True)
    finally:
        tokenizer.padding_side = side
    return completions
