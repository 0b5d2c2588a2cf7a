import pytest
import torch
from conftest import FAMILIES, tiny_model, unit_rows

from dctlib import score_vectors, steer
from dctlib.rank import score_each

D, SURE, SORRY = 32, 4, 5


def by_steering(model, tokenizer, texts, vectors, layer):
    rows = []
    for vector in vectors:
        row = []
        for text in texts:
            with steer(model, layer=layer, vector=vector):
                logits = model(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, -1]
            row.append((logits[SURE] - logits[SORRY]).item())
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 3])
def test_it_equals_steered_full_forward_passes_one_at_a_time(family, layer, tokenizer, texts):
    model, vectors = tiny_model(family), 2 * unit_rows(5, D)
    expected = by_steering(model, tokenizer, texts, vectors, layer)
    found = score_each(model, tokenizer, texts, vectors, layer=layer, progress=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01
    mean = score_vectors(model, tokenizer, texts, vectors, layer=layer, progress=False)
    torch.testing.assert_close(mean, expected.mean(1), rtol=1e-4, atol=1e-5)


def test_batches_agree(llama, tokenizer, texts, monkeypatch):
    vectors = unit_rows(7, D)
    whole = score_vectors(llama, tokenizer, texts, vectors, layer=1, progress=False)
    monkeypatch.setattr("dctlib.rank._BATCH", 2)
    torch.testing.assert_close(score_vectors(llama, tokenizer, texts, vectors, layer=1, progress=False), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positive": "Sure thing"}, "positive='Sure thing' is 2 tokens"),
        ({"negative": "w1 w2 w3"}, "negative='w1 w2 w3' is 3 tokens"),
        ({"layer": 9}, "layer=9"),
        ({"texts": []}, "at least one prompt"),
        ({"vectors": torch.zeros(D)}, r"expected \(m, 32\)"),
        ({"vectors": torch.zeros(0, D)}, r"expected \(m, 32\)"),
    ],
)
def test_bad_options_are_named(llama, tokenizer, texts, changes, message):
    options = {"texts": texts, "vectors": torch.zeros(1, D), "layer": 1, "positive": "Sure", "negative": "Sorry"} | changes
    with pytest.raises(ValueError, match=message):
        score_vectors(llama, tokenizer, options.pop("texts"), options.pop("vectors"), **options)
