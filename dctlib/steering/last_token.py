"""Residuals under many steering vectors: the blocks below the layer run once for all of them."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.maps.replay import capture, replay
from dctlib.models.blocks import check_layer, eager_attention, get_blocks, residual_width
from dctlib.models.chat import tokenize_each
from dctlib.models.packing import PromptTree, pack_prompts
from dctlib.steering.hooks import as_rows

_TOKENS = 2560  # replayed at once, over a batch of vectors
_NUMBERS = 2**26  # read at once: a quarter of a GiB


def replay_last_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    vectors: Float[Tensor, "m d"] | ArrayLike,
    read: Callable[[Tensor], Tensor],
    *,
    compare: Callable[[Tensor, Tensor], Tensor] | None = None,
    layer: int,
    progress: bool = True,
) -> Float[Tensor, "m n ..."]:
    """Return what `read` computes from the last token's residual, for every vector and text.

    Each tree of prompts is captured once. Blocks `layer` … end are then replayed on batches of vectors, see
    :func:`replay_at`.

    Parameters
    ----------
    texts : sequence of str
        Whole prompts; n of them.
    vectors : Tensor or array, (m, d)
        Each is added to h_layer at every position.
    read : callable
        ``read(residual)`` maps the output of the last block, (k, prompts, d), to (k, prompts, …).
    compare : callable, optional
        ``compare(steered, clean)`` makes the result from what `read` returns with the vectors and without (k = 1).

    Returns
    -------
    Tensor, (m, n, …)
        On the CPU.

    Raises
    ------
    ValueError
        If there is no text or vector, a vector has another width, or the layer is out of range or cannot be replayed.
    """
    check_layer(model, layer)
    d = residual_width(model)
    vectors = vectors if isinstance(vectors, Tensor) else as_rows(vectors, d, name="vectors")
    if vectors.ndim != 2 or vectors.shape[1] != d or not len(vectors):
        raise ValueError(f"got vectors of shape {tuple(vectors.shape)}, expected (m, {d}) with m of at least 1")
    trees = pack_prompts(model, tokenize_each(tokenizer, texts))
    bar = tqdm(trees, desc=f"replaying {len(vectors)} vectors", disable=not progress)
    positions = ((tree, torch.stack([path[-1] for path in tree.paths])) for tree in bar)
    return torch.cat(replay_at(model, positions, vectors, read, compare=compare, layer=layer), dim=1)


@torch.no_grad()
def replay_at(
    model: PreTrainedModel,
    trees: Iterable[tuple[PromptTree, Int[Tensor, " n"]]],
    vectors: Float[Tensor, "m d"],
    read: Callable[[Tensor], Tensor],
    *,
    compare: Callable[[Tensor, Tensor], Tensor] | None = None,
    layer: int,
) -> list[Float[Tensor, "m ..."]]:
    """Return what `read` computes from the residuals at the given positions of each tree, for every vector.

    Parameters
    ----------
    trees : iterable of pairs
        Each a tree of prompts, and the positions in it to read.
    vectors, read, compare, layer
        As for :func:`replay_last_token`.

    Returns
    -------
    list of Tensor
        One for each tree, on the CPU.
    """
    blocks, vectors = list(get_blocks(model))[layer:], vectors.to(model.device)
    results = []
    with eager_attention(model), torch.compiler.set_stance("force_eager"):
        for tree, positions in trees:
            prompts = capture(model, tree, source=layer, target=layer + len(blocks))
            clean = read(replay(blocks, prompts, 0 * vectors[:1])[:, positions]) if compare else torch.empty(1)
            at_once = max(1, min(_TOKENS // tree.tokens.shape[1], _NUMBERS // clean.numel()))
            steered = (read(replay(blocks, prompts, batch)[:, positions]) for batch in vectors.split(at_once))
            results.append(torch.cat([compare(each, clean) if compare else each for each in steered]).cpu())
    return results
