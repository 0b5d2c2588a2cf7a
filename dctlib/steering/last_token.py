"""The last token's residual under many steering vectors: the blocks below the layer run once for all of them."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.maps.replay import capture, replay
from dctlib.models.blocks import check_layer, eager_attention, get_blocks, residual_width
from dctlib.models.chat import tokenize_each
from dctlib.models.packing import pack_prompts

_TOKENS = 2560  # replayed at once, over a batch of vectors


def replay_last_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    vectors: Float[Tensor, "m d"],
    read: Callable[[Tensor], Tensor],
    *,
    compare: Callable[[Tensor, Tensor], Tensor] | None = None,
    layer: int,
    progress: bool = True,
) -> Float[Tensor, "m n ..."]:
    """Return what `read` computes from the last token's residual, for every vector and text.

    Each tree of prompts is captured once. Blocks `layer` … end are then replayed on batches of vectors.

    Parameters
    ----------
    texts : sequence of str
        Whole prompts; n of them.
    vectors : Tensor, (m, d)
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
    if vectors.ndim != 2 or vectors.shape[1] != d or not len(vectors):
        raise ValueError(f"got vectors of shape {tuple(vectors.shape)}, expected (m, {d}) with m of at least 1")
    trees = pack_prompts(model, tokenize_each(tokenizer, texts))
    vectors = vectors.to(model.device)
    blocks = list(get_blocks(model))[layer:]
    columns = []
    bar = tqdm(total=len(texts), desc=f"replaying {len(vectors)} vectors", disable=not progress)
    with torch.no_grad(), eager_attention(model), torch.compiler.set_stance("force_eager"), bar:
        for tree in trees:
            last = torch.stack([path[-1] for path in tree.paths])
            prompts = capture(model, tree, source=layer, target=layer + len(blocks))
            reference = read(replay(blocks, prompts, 0 * vectors[:1])[:, last]) if compare else torch.empty(0)
            rows = []
            for batch in vectors.split(max(1, _TOKENS // tree.tokens.shape[1])):
                found = read(replay(blocks, prompts, batch)[:, last])
                rows.append(compare(found, reference) if compare else found)
            columns.append(torch.cat(rows))
            bar.update(len(tree.paths))
    return torch.cat(columns, dim=1).cpu()
