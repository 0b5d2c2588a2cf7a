import torch

from dctlib.baselines import random_vectors


def test_random_vectors_have_the_norm_and_the_seed():
    vectors = random_vectors(50, 16, norm=3.0, seed=1)
    torch.testing.assert_close(vectors.norm(dim=1), torch.full((50,), 3.0))
    assert torch.equal(vectors, random_vectors(50, 16, norm=3.0, seed=1))
    assert not torch.equal(vectors, random_vectors(50, 16, norm=3.0, seed=2))
