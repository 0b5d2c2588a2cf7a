import pytest
import torch
from tiny import FAMILIES, tiny_model, unit_rows

from dctlib import steer
from dctlib.steering.effects import effects

D = 32


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_equal_steered_full_forward_passes(family, tokenizer, texts):
    model, vectors = tiny_model(family), 20 * unit_rows(5, D)
    found = effects(model, tokenizer, texts, vectors, layer=1, progress=False)
    for column, text in enumerate(texts):
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        clean = model(tokens).logits[0, -1].float().log_softmax(-1)
        assert found.clean[column] == clean.argmax()
        for row, vector in enumerate(vectors):
            with steer(model, layer=1, vector=vector):
                steered = model(tokens).logits[0, -1].float().log_softmax(-1)
            expected = torch.nn.functional.kl_div(clean, steered, log_target=True, reduction="sum")
            torch.testing.assert_close(found.divergence[row, column], expected, rtol=1e-3, atol=1e-4)
            assert found.token[row, column] == steered.argmax()
    assert found.divergence.max() > 1e-4


def test_nothing_added_changes_nothing(llama, tokenizer, texts):
    found = effects(llama, tokenizer, texts, torch.zeros(1, D), layer=0, progress=False)
    assert found.divergence.abs().max() < 1e-6
    assert torch.equal(found.token[0], found.clean)


def test_batches_agree(llama, tokenizer, texts, monkeypatch):
    whole = effects(llama, tokenizer, texts, unit_rows(7, D), layer=2, progress=False)
    monkeypatch.setattr("dctlib.steering.last_token._TOKENS", 20)
    parts = effects(llama, tokenizer, texts, unit_rows(7, D), layer=2, progress=False)
    torch.testing.assert_close(parts.divergence, whole.divergence)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"texts": []}, "expected at least one prompt in a list"),
        ({"texts": "w0"}, "expected at least one prompt in a list"),
        *(({"vectors": torch.zeros(shape)}, r"expected \(m, 32\)") for shape in [(D,), (0, D), (1, D + 1)]),
    ],
)
def test_bad_input_is_named(llama, tokenizer, texts, bad, message):
    options = {"texts": texts, "vectors": torch.zeros(1, D)} | bad
    with pytest.raises(ValueError, match=message):
        effects(llama, tokenizer, options["texts"], options["vectors"], layer=0)
