import pytest
import torch
from tiny import FAMILIES, tiny_model, unit_rows

from dctlib import ablate, score_vectors, steer
from dctlib.steering.scoring import Scores, score_each, score_texts

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
    torch.testing.assert_close(found.logit_diff, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01
    mean = score_vectors(model, tokenizer, texts, vectors, layer=layer, progress=False)
    torch.testing.assert_close(mean, expected.mean(1), rtol=1e-4, atol=1e-5)


def test_is_top1_tells_the_greedy_token(llama, tokenizer, texts):
    vectors = torch.cat([torch.zeros(1, D), 30 * unit_rows(40, D).float()])
    logits = llama(tokenizer(texts[0], return_tensors="pt")["input_ids"]).logits[0, -1]
    word = int(logits.argmax())  # what the clean model says after the first text
    positive = tokenizer.convert_ids_to_tokens(word)
    is_top1 = score_each(llama, tokenizer, texts, vectors, layer=3, positive=positive, progress=False).is_top1
    for row, vector in enumerate(vectors):
        for column, text in enumerate(texts):
            with steer(llama, layer=3, vector=vector):
                token = llama(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, -1].argmax()
            assert is_top1[row, column].item() == (token.item() == word)
    assert is_top1.any()
    assert not is_top1.all()


def test_the_best_vector_is_one_under_which_the_word_comes_first():
    logit_diff = torch.tensor([[9.0, 9.0], [5.0, 6.0], [7.0, 1.0]])
    is_top1 = torch.tensor([[False, False], [True, False], [True, True]])
    assert Scores(logit_diff, is_top1).best() == 1
    assert Scores(logit_diff, is_top1).ranking() == [1, 2, 0]
    assert Scores(logit_diff, is_top1).ranking(min_top1=0) == [0, 1, 2]
    assert Scores(logit_diff, is_top1).best(min_top1=0.9) == 2
    assert Scores(logit_diff, torch.zeros(3, 2, dtype=torch.bool)).best() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_score_texts_equals_one_at_a_time_also_while_ablated(family, tokenizer, texts):
    texts = [*texts, f"{texts[-1]} w20", f"{texts[-1]} w21 w22"]  # the last three share their beginning
    model, direction = tiny_model(family), unit_rows(1, D)[0]
    clean = by_steering(model, tokenizer, texts, torch.zeros(1, D, dtype=torch.float64), 0)[0]
    torch.testing.assert_close(score_texts(model, tokenizer, texts), clean, rtol=1e-4, atol=1e-5)
    with ablate(model, direction):
        found = score_texts(model, tokenizer, texts)
        expected = by_steering(model, tokenizer, texts, torch.zeros(1, D, dtype=torch.float64), 0)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - clean).abs().max() > 1e-3


def test_batches_agree(llama, tokenizer, texts, monkeypatch):
    vectors = unit_rows(7, D)
    whole = score_vectors(llama, tokenizer, texts, vectors, layer=1, progress=False)
    monkeypatch.setattr("dctlib.steering.last_token._TOKENS", 20)
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
    options = {
        "texts": texts,
        "vectors": torch.zeros(1, D),
        "layer": 1,
        "positive": "Sure",
        "negative": "Sorry",
    } | changes
    with pytest.raises(ValueError, match=message):
        score_vectors(llama, tokenizer, options.pop("texts"), options.pop("vectors"), **options)


def test_arrays_are_vectors_and_words_differ(llama, tokenizer, texts):
    vectors = 2 * unit_rows(3, D)
    expected = score_vectors(llama, tokenizer, texts, vectors, layer=1, progress=False)
    for same in (vectors.numpy(), vectors.tolist()):
        assert torch.equal(score_vectors(llama, tokenizer, texts, same, layer=1, progress=False), expected)
    with pytest.raises(ValueError, match="expected two different words"):
        score_vectors(llama, tokenizer, texts, vectors, layer=1, positive="Sure", negative="Sure")
