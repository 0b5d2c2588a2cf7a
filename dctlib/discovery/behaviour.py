"""Which vectors make a model say the same, by the words of their completions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.cluster import AgglomerativeClustering
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from torch.nn.functional import pad

_SAME = 0.5  # mean similarity within a group


def word_features(completions: Sequence[Sequence[str]]) -> Float[Tensor, "k f"]:
    """Return a unit row for each vector: the dot product of two rows says how alike the vectors make the model answer.

    The dot product is the mean over requests of the cosine between both completions of a request, as TF-IDF weights
    of their words and pairs of words. It is 1 where all completions are equal and 0 where none shares a word.

    Parameters
    ----------
    completions : sequence of sequence of str, k of n
        For each vector its completions of the same n requests.
    """
    n = len(completions[0])
    texts = [text if text.split() else "(nothing)" for each in completions for text in each]
    weights = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", sublinear_tf=True).fit_transform(texts)
    by_request = [weights[request::n].toarray() for request in range(n)]
    return torch.from_numpy(np.hstack(by_request) / np.sqrt(n)).float()


def group_behaviours(completions: Sequence[Sequence[str]]) -> list[int]:
    """Return a number for each vector, the same for those that make the model say much the same; the first gets 1.

    Groups are those of average linkage at a mean similarity of 0.5, see :func:`word_features`.
    """
    if len(completions) < 2:
        return [1] * len(completions)
    features = word_features(completions)
    distances = (1 - features @ features.T).clamp(min=0).fill_diagonal_(0).numpy()
    within: Any = {"n_clusters": None, "distance_threshold": 1 - _SAME}
    clustering = AgglomerativeClustering(**within, metric="precomputed", linkage="average")
    labels = clustering.fit_predict(distances).tolist()
    order = list(dict.fromkeys(labels))
    return [order.index(label) + 1 for label in labels]


def map_behaviours(completions: Sequence[Sequence[str]]) -> Float[Tensor, "k 2"]:
    """Return the first two principal components of :func:`word_features`, to draw: near points say alike."""
    features = word_features(completions)
    padded = pad(features - features.mean(0), (0, 1, 0, 1))  # so that even one row has two components
    left, singular_values, _ = torch.linalg.svd(padded, full_matrices=False)
    return (left * singular_values)[:-1, :2]
