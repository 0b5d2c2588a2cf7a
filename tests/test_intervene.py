import pytest
import torch
from conftest import FAMILIES, hooked_residual, tiny_model, unit_rows

from dctlib import CausalMap, steer
from dctlib.models import blocks_of

D = 32


@pytest.fixture
def tokens():
    return torch.tensor([[6, 7, 8, 9, 10]])


def residuals(model, call, layer):
    """Every h_layer that the model computes during `call`."""
    seen = []

    def look(_module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    # Registered inside steer's context, so after its hook: what the block itself receives.
    handle = blocks_of(model)[layer].register_forward_pre_hook(look, with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_it_changes_exactly_the_fitted_residual(family, tokenizer):
    """The target residual under steering is the causal map's own, so layer and hook point agree (published fault 3)."""
    model, text, vector = tiny_model(family), "w0 w1 w2 w3 w4", 3 * unit_rows(1, D)[0]
    cmap = CausalMap.from_model(model, tokenizer, [text], source=1, target=3, positions=2)
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    clean = hooked_residual(model, tokens, 1, 3)
    with steer(model, layer=1, vector=vector):
        steered = hooked_residual(model, tokens, 1, 3)
    change = (steered - clean)[0, -2:].mean(0)
    assert (change - cmap(vector[None])[0]).norm() < 1e-6 * change.norm()


@pytest.mark.parametrize("use_cache", [True, False])
def test_prefill_and_every_decode_step(llama, tokens, use_cache):
    vector = unit_rows(1, D)[0]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": use_cache}
    with steer(llama, layer=2, vector=vector):
        output = llama.generate(tokens, **options)
        steered = residuals(llama, lambda: llama.generate(tokens, **options), 2)
    with steer(llama, layer=2, vector=0 * vector):
        clean = residuals(llama, lambda: llama(output[:, :-1], use_cache=False), 2)[0]
    assert len(steered) == 4
    widths = [step.shape[1] for step in steered]
    assert widths == ([5, 1, 1, 1] if use_cache else [5, 6, 7, 8])
    whole = torch.cat(steered, dim=1) if use_cache else steered[-1]
    # Blocks 0 and 1 are untouched and causal, so h_2 of the whole sequence tells what each step started from.
    torch.testing.assert_close(whole, clean + vector, rtol=1e-5, atol=1e-6)


def test_one_vector_a_row_equals_one_at_a_time(llama, tokens):
    vectors = unit_rows(3, D)
    batch = tokens.expand(3, -1)
    with steer(llama, layer=1, vector=vectors):
        together = llama(batch).logits
    for row, vector in enumerate(vectors):
        with steer(llama, layer=1, vector=vector):
            torch.testing.assert_close(llama(tokens).logits[0], together[row], rtol=1e-5, atol=1e-6)


def test_padding_does_not_change_the_answer(llama, tokenizer):
    vector = unit_rows(1, D)[0]
    tokenizer.padding_side = "left"
    batch = tokenizer(["w0 w1 w2 w3 w4 w5", "w6 w7"], return_tensors="pt", padding=True)
    short = tokenizer(["w6 w7"], return_tensors="pt")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with steer(llama, layer=1, vector=vector):
        padded = llama.generate(**{k: batch[k] for k in ("input_ids", "attention_mask")}, **options)
        alone = llama.generate(**{k: short[k] for k in ("input_ids", "attention_mask")}, **options)
    assert padded[1, -5:].tolist() == alone[0, -5:].tolist()


def test_contexts_nest(llama, tokens):
    one, two = unit_rows(2, D)
    with steer(llama, layer=1, vector=one), steer(llama, layer=1, vector=two):
        nested = llama(tokens).logits
    with steer(llama, layer=1, vector=one + two):
        torch.testing.assert_close(llama(tokens).logits, nested, rtol=1e-6, atol=1e-9)


def test_nothing_is_left_also_after_an_exception(llama, tokens):
    before = llama(tokens).logits
    with pytest.raises(RuntimeError, match="boom"), steer(llama, layer=1, vector=unit_rows(1, D)[0]):
        raise RuntimeError("boom")
    assert torch.equal(llama(tokens).logits, before)
    assert not any(block._forward_pre_hooks for block in llama.model.layers)


@pytest.mark.parametrize(
    ("layer", "vector", "message"),
    [
        (4, torch.zeros(D), "from 0 to 3"),
        (-1, torch.zeros(D), "layer=-1"),
        (1, torch.zeros(D + 1), "expected"),
        (1, torch.zeros(2, 3, D), "expected"),
        (1, torch.full((D,), float("inf")), "not finite"),
    ],
)
def test_bad_options_are_named(llama, layer, vector, message):
    with pytest.raises(ValueError, match=message), steer(llama, layer=layer, vector=vector):
        pass


def test_a_batch_of_another_size_is_refused_and_leaves_no_trace(llama, tokens):
    with pytest.raises(ValueError, match="3 vectors for a batch of 2"), steer(llama, layer=1, vector=torch.zeros(3, D)):
        llama(tokens.expand(2, -1))
    assert not any(block._forward_pre_hooks for block in llama.model.layers)
