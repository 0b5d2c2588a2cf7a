"""What steering vectors do when nobody says what to look for: to the next token, and like which other vectors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.causal_map import capture, replay
from dctlib.models import blocks_of, check_layer, logits_of, replaying
from dctlib.prompt_tree import plant
from dctlib.prompts import tokenize

_TOKENS = 2560  # of a batch of vectors


@dataclass(frozen=True)
class Effects:
    """What each of m steering vectors does to the next token after each of n texts.

    Attributes
    ----------
    divergence : Tensor, (m, n)
        KL(steered ‖ clean) of its distribution, in nats.
    token : Tensor, (m, n)
        The most likely one.
    clean : Tensor, (n,)
        The most likely one without steering.
    """

    divergence: Float[Tensor, "m n"]
    token: Int[Tensor, "m n"]
    clean: Int[Tensor, " n"]


def effects(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    vectors: Float[Tensor, "m d"],
    *,
    layer: int,
    progress: bool = True,
) -> Effects:
    """Compare the next token's distribution after each text with and without each vector, added at `layer`.

    Raises
    ------
    ValueError
        If there is no text or vector, or the layer is out of range.
    """
    check_layer(model, layer)
    if isinstance(texts, str) or not texts or vectors.ndim != 2 or not len(vectors):
        raise ValueError(f"got {texts!r} and vectors {tuple(vectors.shape)}, expected texts in a list and (m, d)")
    blocks, vectors = list(blocks_of(model))[layer:], vectors.to(model.device)
    vocabulary = torch.arange(model.config.get_text_config().vocab_size, device=model.device)
    divergences, tokens, clean_tokens = [], [], []
    bar = tqdm(total=len(texts), desc=f"effects of {len(vectors)} vectors", disable=not progress)
    with torch.no_grad(), replaying(model), bar:
        for tree in plant(model, [tokenize(tokenizer, text) for text in texts]):
            prefix = capture(model, tree, source=layer, target=layer + len(blocks))

            def log_p(thetas: Tensor, prefix=prefix) -> Float[Tensor, "m n vocabulary"]:
                last = replay(blocks, prefix, thetas)[:, prefix.last()]
                return logits_of(model, last, vocabulary).log_softmax(-1)

            clean = log_p(torch.zeros_like(vectors[:1]))
            rows = []
            for part in vectors.split(max(1, _TOKENS // tree.tokens.shape[1])):
                steered = log_p(part)
                rows.append((torch.sum(steered.exp() * (steered - clean), -1), steered.argmax(-1)))
            divergences.append(torch.cat([divergence for divergence, _ in rows]))
            tokens.append(torch.cat([token for _, token in rows]))
            clean_tokens.append(clean[0].argmax(-1))
            bar.update(len(tree.paths))
    return Effects(torch.cat(divergences, 1).cpu(), torch.cat(tokens, 1).cpu(), torch.cat(clean_tokens).cpu())


def clusters(vectors: Float[Tensor, "m d"], *, cosine: float = 0.5) -> list[int]:
    """A number for each vector; those whose mean cosine is at least `cosine` share one (average linkage).

    The first vector of each number represents it, if the vectors are in the order of interest.
    """
    if not -1 < cosine < 1:
        raise ValueError(f"got cosine={cosine}, expected it between -1 and 1")
    if len(vectors) == 1:
        return [0]
    joined = linkage(vectors.double().cpu().numpy(), "average", metric="cosine")
    numbers = fcluster(joined, 1 - cosine, criterion="distance").tolist()
    order = list(dict.fromkeys(numbers))
    return [order.index(number) for number in numbers]
