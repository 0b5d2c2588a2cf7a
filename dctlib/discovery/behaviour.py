"""Which vectors make a model say much the same, by the words of their completions."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from sklearn.feature_extraction.text import CountVectorizer
from torch import Tensor
from torch.nn.functional import normalize, pad

from dctlib.fits.compare import cosine_clusters
from dctlib.models.chat import Instruction, last_user_turn

_SAME = 0.5  # mean similarity within a group
_NO_SPACES = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"  # Thai, Japanese and Chinese, where each character counts
# A word, or a run of punctuation, because lists and code are behaviours.
_WORD = rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+|[^\w\s]+"


def word_features(requests: Sequence[Instruction], completions: Sequence[Sequence[str]]) -> Float[Tensor, "k f"]:
    """Return a unit row for each vector: the dot product of two rows says how alike the vectors make the model answer.

    A row holds, for each word and pair of words, the share of completions in which it occurs. What a completion repeats
    of its request does not count, because all completions about the request hold it.

    Parameters
    ----------
    requests : sequence of str or of conversations, n of them
        What the completions answer.
    completions : sequence of sequence of str, k of n
        For each vector its completions.
    """
    counter = CountVectorizer(ngram_range=(1, 2), token_pattern=_WORD, binary=True)
    texts = [text if text.split() else "(nothing)" for each in completions for text in each]
    said: Any = counter.fit_transform(texts)
    asked: Any = counter.transform([last_user_turn(request) for request in requests])
    words = torch.from_numpy(said.toarray()).view(len(completions), len(requests), -1)
    shares = (words * (1 - torch.from_numpy(asked.toarray()))).float().mean(1)
    nothing_new = (shares == 0).all(1, keepdim=True)
    return normalize(torch.cat([shares, nothing_new], 1), dim=1)


def group_behaviours(requests: Sequence[Instruction], completions: Sequence[Sequence[str]]) -> list[int]:
    """Return a number for each vector, the same for those that make the model say much the same; the first gets 1.

    Groups are those of average linkage at a mean similarity of 0.5, see :func:`word_features`.
    """
    if not completions:
        return []
    return [number + 1 for number in cosine_clusters(word_features(requests, completions), cosine=_SAME)]


def map_behaviours(requests: Sequence[Instruction], completions: Sequence[Sequence[str]]) -> Float[Tensor, "k 2"]:
    """Return the first two principal components of :func:`word_features`, to draw: near points say alike."""
    features = word_features(requests, completions)
    padded = pad(features - features.mean(0), (0, 1, 0, 1))  # so that even one row has two components
    left, singular_values, _ = torch.linalg.svd(padded, full_matrices=False)
    return (left * singular_values)[:-1, :2]
