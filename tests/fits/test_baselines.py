import pytest
import torch

from dctlib.fits.baselines import difference_of_means, random_vectors


def test_random_vectors_have_the_norm_and_the_seed():
    vectors = random_vectors(50, 16, norm=3.0, seed=1)
    torch.testing.assert_close(vectors.norm(dim=1), torch.full((50,), 3.0))
    assert torch.equal(vectors, random_vectors(50, 16, norm=3.0, seed=1))
    assert not torch.equal(vectors, random_vectors(50, 16, norm=3.0, seed=2))


def test_difference_of_means_is_that_of_the_full_models_hidden_states(llama, tokenizer, texts):
    def mean(rows):
        tokens = [tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"] for text in rows]
        return torch.stack([llama(t, output_hidden_states=True).hidden_states[2][0, -1] for t in tokens]).mean(0)

    found = difference_of_means(llama, tokenizer, texts[:2], texts[2:], layer=2)
    torch.testing.assert_close(found.double(), mean(texts[:2]) - mean(texts[2:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("texts", ["Tell me", []])
def test_a_mean_needs_texts_in_a_list(llama, tokenizer, texts):
    with pytest.raises(ValueError, match="at least one prompt in a list"):
        difference_of_means(llama, tokenizer, ["w0"], texts, layer=2)
