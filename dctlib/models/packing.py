"""Prompts packed into one sequence in which every shared beginning is computed once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from dctlib.models.blocks import adds_tokens, eager_attention, unwrap
from dctlib.models.trace import once_per_model

_LEAST_SHARED = 0.25  # of a prompt's tokens, for it to join a tree

# Settings that bound how far a token sees, or change its rotary embedding beyond a length.
_REACHES = ("window", "window_size", "chunk_size", "local_attention", "original_max_position_embeddings")

# (number of the beginning one token shorter, last token) → number of the beginning.
_Trie = dict[tuple[int, int], int]

_ROOT = -1  # the empty beginning


@dataclass(frozen=True)
class PromptTree:
    """A tree of tokens: each attends to itself and to those before it in its own prompt.

    Attributes
    ----------
    tokens : Tensor, (1, T)
        The last token of each distinct beginning of a prompt.
    position_ids : Tensor, (1, T)
        The position of each token in its own prompt.
    paths : list of Tensor, (t,)
        For every prompt, the indices of its tokens, first to last.
    """

    tokens: Int[Tensor, "1 T"]
    position_ids: Int[Tensor, "1 T"]
    paths: list[Int[Tensor, " t"]]

    @classmethod
    def from_prompts(cls, prompts: Sequence[Sequence[int]]) -> "PromptTree":
        """Return the tree of some prompts' token ids."""
        trie: _Trie = {}
        paths = [torch.tensor(_add(trie, prompt)) for prompt in prompts]
        position_ids = torch.empty(1, len(trie), dtype=torch.long)
        for path in paths:
            position_ids[0, path] = torch.arange(len(path))
        return cls(torch.tensor([[token for _, token in trie]]), position_ids, paths)

    @property
    def attention_mask(self) -> Bool[Tensor, "T T"]:
        """Whether the row's token attends to the column's; not kept, because it takes T² bytes."""
        size = self.tokens.shape[1]
        mask = torch.zeros(size, size, dtype=torch.bool)
        for path in self.paths:
            mask[path[:, None], path] |= torch.ones(len(path), len(path), dtype=torch.bool).tril()
        return mask

    def arguments(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the keyword arguments to call `model` with; eager attention adds the mask to its logits."""
        tokens = {"input_ids": self.tokens.to(model.device)}
        if len(self.paths) == 1:
            return tokens
        seen = self.attention_mask
        mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
        mask = mask.to(model.device)[None, None]
        return {**tokens, "position_ids": self.position_ids.to(model.device), "attention_mask": mask}


def pack_prompts(
    model: PreTrainedModel, rows: Sequence[Int[Tensor, "1 t"]], *, most_tokens: int = 256
) -> list[PromptTree]:
    """Pack prompts, in order, into trees on which `model` gives what it gives on each prompt alone.

    A prompt joins the tree before it if a quarter of its tokens are there already and the tree stays within
    `most_tokens`, because attention costs the square of a tree's size. A tree also stays within every window of the
    model's attention. Prompts stay alone in a model that fails :func:`supports_packing`.

    Raises
    ------
    ValueError
        If `model` adds learned tokens, which its blocks run alone do not know, or has no embedding for a token.
    """
    if adds_tokens(model):
        raise ValueError(
            "this model has learned tokens before every prompt (prompt or prefix tuning), which its blocks alone do "
            "not know; steer() and generate_completions() take it, and maps and scores need a model without them"
        )
    prompts = [row[0].tolist() for row in rows]
    check_vocabulary(model, chain.from_iterable(prompts))
    groups: list[list[list[int]]] = []
    trie: _Trie = {}
    most_tokens = min([most_tokens, *reaches(unwrap(model))])
    for prompt in prompts:
        shared = _shared_length(trie, prompt)
        fits = trie and len(trie) + len(prompt) - shared <= most_tokens
        if fits and shared >= _LEAST_SHARED * len(prompt) and supports_packing(model):
            groups[-1].append(prompt)
        else:
            groups.append([prompt])
            trie = {}
        _add(trie, prompt)
    return [PromptTree.from_prompts(group) for group in groups]


def vocabulary_size(model: Any) -> int:
    """Return the number of rows of the model's input embedding."""
    return unwrap(model).get_input_embeddings().weight.shape[0]


def check_vocabulary(model: Any, tokens: Iterable[int]) -> None:
    """Raise ValueError if the model has no embedding for one of the token ids."""
    size = vocabulary_size(model)
    if unknown := sorted({token for token in tokens if token >= size}):
        raise ValueError(
            f"got the token ids {unknown[:5]}, and the model has embeddings for {size}; is it another model's "
            f"tokenizer? After tokenizer.add_tokens, call model.resize_token_embeddings"
        )


def _add(trie: _Trie, prompt: Sequence[int]) -> list[int]:
    """Put the beginnings of a prompt into `trie`, and return their numbers, shortest first."""
    path, node = [], _ROOT
    for token in prompt:
        node = trie.setdefault((node, token), len(trie))
        path.append(node)
    return path


def _shared_length(trie: _Trie, prompt: Sequence[int]) -> int:
    """Return the number of beginnings of a prompt that are in `trie`."""
    node: int | None = _ROOT
    for length, token in enumerate(prompt):
        if (node := trie.get((node, token))) is None:
            return length
    return len(prompt)


@once_per_model
def supports_packing(model: PreTrainedModel) -> bool:
    """Return whether `model` gives the same logits on a tree of two short prompts as on each alone.

    It does if tokens interact in attention only, which accepts any mask and any positions.
    """
    try:
        with torch.no_grad(), eager_attention(model):
            return _tree_equals_prompts(model)
    except Exception:  # whatever a family raises under a mask of its own
        return False


def _tree_equals_prompts(model: PreTrainedModel) -> bool:
    """Return whether errors are small compared with the change at a token when the one before is exchanged.

    A single prompt is extended by further tokens to the length of the tree, so that both round alike.
    """
    start, first, second, last, tail, behind = ordinary_tokens(model, 4, 1, 1, 1, 8, 10)
    prompts = [start + first + last + tail, start + second + last]
    tree = PromptTree.from_prompts(prompts)
    size = tree.tokens.shape[1]
    alone = [_logits(model, PromptTree.from_prompts([(prompt + behind)[:size]])) for prompt in prompts]
    found, place = _logits(model, tree), len(prompts[1]) - 1  # of `last`
    scale = (alone[0][place] - alone[1][place]).norm()
    pairs = zip(tree.paths, alone, strict=True)
    error = max((found[path] - expected[: len(path)]).norm(dim=-1).max() for path, expected in pairs)
    return bool(error < (1e-3 if torch.finfo(model.dtype).bits >= 32 else 0.02) * scale)


def _logits(model: Any, tree: PromptTree) -> Tensor:
    logits = model(**tree.arguments(model), use_cache=False).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def ordinary_tokens(model: PreTrainedModel, *counts: int) -> Iterator[list[int]]:
    """Yield lists of distinct token ids that the configuration gives no special meaning."""
    special = {value for name, value in _settings(model.config.to_dict()) if "token" in name}
    size = model.config.get_text_config().vocab_size
    spread = [token for token in range(0, size, max(1, size // (3 * sum(counts)))) if token not in special]
    for count in counts:
        yield [spread.pop() for _ in range(count)]


def reaches(model: PreTrainedModel) -> list[int]:
    """Return for each setting that bounds how far a token sees the number of tokens up to which it sees all."""
    config = model.config.get_text_config().to_dict()
    bounds = [value for name, value in _settings(config) if name.endswith(_REACHES) and value > 1]
    if any(value == "dynamic" for _, value in _settings(config.get("rope_parameters") or {}, str)):
        bounds.append(config["max_position_embeddings"])
    return bounds


def _settings(config: dict[str, Any], kind: type = int) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of one type in a configuration and those nested in it."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _settings(value, kind)
        for one in value if isinstance(value, list) else [value]:
            if type(one) is kind:
                yield name, one
