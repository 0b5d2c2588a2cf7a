"""Prompts packed into one sequence in which every shared beginning is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from dctlib.models.blocks import supports_packing

_LEAST_SHARED = 0.25  # of a prompt's tokens, for it to join a tree


@dataclass(frozen=True)
class PromptTree:
    """A tree of tokens: each attends to itself and to those before it in its own prompt.

    Attributes
    ----------
    tokens : Tensor, (1, T)
        One token for each distinct beginning of a prompt, its last.
    position_ids : Tensor, (1, T)
        The position of each token in its own prompt.
    attention_mask : Tensor, (T, T)
        Whether the row's token attends to the column's.
    paths : list of Tensor, (t,)
        For every prompt, the indices of its tokens, first to last.
    """

    tokens: Int[Tensor, "1 T"]
    position_ids: Int[Tensor, "1 T"]
    attention_mask: Bool[Tensor, "T T"]
    paths: list[Int[Tensor, " t"]]

    @classmethod
    def from_prompts(cls, prompts: Sequence[Sequence[int]]) -> "PromptTree":
        """Return the tree of some prompts' token ids."""
        nodes: dict[tuple[int, ...], int] = {}
        paths = []
        for prompt in prompts:
            beginnings = [tuple(prompt[: end + 1]) for end in range(len(prompt))]
            paths.append(torch.tensor([nodes.setdefault(beginning, len(nodes)) for beginning in beginnings]))
        mask = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        for path in paths:
            mask[path[:, None], path] |= torch.ones(len(path), len(path), dtype=torch.bool).tril()
        tokens = torch.tensor([[beginning[-1] for beginning in nodes]])
        return cls(tokens, mask.sum(1)[None] - 1, mask, paths)

    def arguments(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the keyword arguments to call `model` with; eager attention adds the mask to its logits."""
        tokens = {"input_ids": self.tokens.to(model.device)}
        if len(self.paths) == 1:
            return tokens
        mask = torch.zeros(self.attention_mask.shape, dtype=model.dtype)
        mask = mask.masked_fill(~self.attention_mask, torch.finfo(model.dtype).min).to(model.device)[None, None]
        return {**tokens, "position_ids": self.position_ids.to(model.device), "attention_mask": mask}


def pack_prompts(
    model: PreTrainedModel, rows: Sequence[Int[Tensor, "1 t"]], *, most_tokens: int = 256
) -> list[PromptTree]:
    """Pack prompts, in order, into trees on which `model` gives what it gives on each prompt alone.

    A prompt joins the tree before it if a quarter of its tokens are there already and the tree stays within
    `most_tokens`, because attention costs the square of a tree's size. Prompts stay alone in families that are not
    tested for it, and where attention has a window shorter than the longest prompt.
    """
    groups: list[list[list[int]]] = []
    seen: set[tuple[int, ...]] = set()
    can_share = supports_packing(model, max(row.shape[1] for row in rows))
    for row in rows:
        prompt = row[0].tolist()
        beginnings = {tuple(prompt[: end + 1]) for end in range(len(prompt))}
        shared = len(beginnings & seen) >= _LEAST_SHARED * len(prompt)
        if can_share and shared and len(beginnings | seen) <= most_tokens:
            groups[-1].append(prompt)
            seen |= beginnings
        else:
            groups.append([prompt])
            seen = beginnings
    return [PromptTree.from_prompts(group) for group in groups]
