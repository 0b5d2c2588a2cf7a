"""What steering vectors do when nobody says what to look for: to the next token, and like which other vectors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.causal_map import capture, replay
from dctlib.models import blocks_of, check_layer, logits_of, replaying, width_of
from dctlib.prompt_tree import plant
from dctlib.prompts import tokenize_each

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
        If there is no text or vector, they have another width, or the layer is out of range.
    """
    _check(model, texts, vectors, layer)
    blocks, vectors = list(blocks_of(model))[layer:], vectors.to(model.device)
    vocabulary = torch.arange(model.config.get_text_config().vocab_size, device=model.device)
    divergences, tokens, clean_tokens = [], [], []
    bar = tqdm(total=len(texts), desc=f"effects of {len(vectors)} vectors", disable=not progress)
    with torch.no_grad(), replaying(model), bar:
        for tree in plant(model, tokenize_each(tokenizer, texts)):
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


def growth(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    vectors: Float[Tensor, "m d"],
    *,
    layer: int,
) -> Float[Tensor, "m depths"]:
    """Length of the change that each vector makes to the last token's residual, layer by layer, mean over texts.

    Returns
    -------
    Tensor, (m, blocks + 1)
        At h_0 … h_blocks: zero below `layer`, where the vector is added, and its own length there.

    Raises
    ------
    ValueError
        As :func:`effects`.
    """
    _check(model, texts, vectors, layer)
    depth, blocks, vectors = len(blocks_of(model)), list(blocks_of(model))[layer:], vectors.to(model.device)
    lengths = torch.zeros(len(vectors), depth + 1)
    lengths[:, layer] = vectors.float().norm(dim=1).cpu()
    seen: list[Tensor] = []

    def keep(_block: nn.Module, _args: tuple, output: Tensor | tuple) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with torch.no_grad(), replaying(model):
        for tree in plant(model, tokenize_each(tokenizer, texts)):
            prefix = capture(model, tree, source=layer, target=depth)
            handles = []
            try:
                for block in blocks:
                    handles.append(block.register_forward_hook(keep))  # noqa: PERF401
                replay(blocks, prefix, torch.zeros_like(vectors[:1]))
                clean, first = [hidden[:, prefix.last()].float() for hidden in seen], 0
                for part in vectors.split(max(1, _TOKENS // tree.tokens.shape[1])):
                    seen.clear()
                    replay(blocks, prefix, part)
                    for place, (hidden, before) in enumerate(zip(seen, clean, strict=True), start=layer + 1):
                        changes = (hidden[:, prefix.last()].float() - before).norm(dim=-1).sum(1)
                        lengths[first : first + len(part), place] += changes.cpu() / len(texts)
                    first += len(part)
                seen.clear()
            finally:
                for handle in handles:
                    handle.remove()
    return lengths


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


def _check(model: PreTrainedModel, texts: Sequence[str], vectors: Tensor, layer: int) -> None:
    check_layer(model, layer)
    d = width_of(model)
    if isinstance(texts, str) or not texts or vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != d:
        raise ValueError(f"got {texts!r} and vectors {tuple(vectors.shape)}, expected texts in a list and (m, {d})")
