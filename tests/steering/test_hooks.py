import numpy as np
import pytest
import torch
from tiny import BLOCKS, FAMILIES, assert_near, hooked_residual, tiny_model, unit_rows

from dctlib import CausalMap, ablate, steer
from dctlib.models.blocks import get_blocks
from dctlib.steering.hooks import ablated_copy

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
    handle = get_blocks(model)[layer].register_forward_pre_hook(look, with_kwargs=True)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_blocks_is_the_last_block_s_output(family, tokens):
    """A control vector's direction of the last block is added there, in front of the final norm."""
    model, vector = tiny_model(family), 3 * unit_rows(1, D)[0]
    norms = {"GPT2": "ln_f", "GPTNeoX": "final_layer_norm"}
    norm = model.base_model.get_submodule(norms.get(family, "norm"))
    handle = norm.register_forward_pre_hook(lambda _norm, args: (args[0] + vector,))
    expected = model(tokens).logits
    handle.remove()
    with steer(model, layer=BLOCKS, vector=vector):
        assert_near(model(tokens).logits, expected, 1e-9)
    assert not torch.allclose(model(tokens).logits, expected, atol=0.1)


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
        (5, torch.zeros(D), "from 0 to 3"),
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


def forbidden(model, directions, call):
    """The largest share of any residual, embedding to last block, that lies in the span of `directions`."""
    span = torch.linalg.qr(directions.reshape(-1, D).T).Q
    layers = [residuals(model, call, layer) for layer in range(len(get_blocks(model)))]
    return max((h @ span).norm().item() / h.norm().item() for seen in layers for h in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_keeps_the_residual_out_of_the_span_at_every_layer_and_step(family, tokens):
    model, directions = tiny_model(family), 3 * unit_rows(2, D)
    whole = model(tokens).logits

    def generate():
        model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)

    assert forbidden(model, directions, generate) > 0.05
    with ablate(model, directions):
        assert forbidden(model, directions, generate) < 1e-6
        assert not torch.allclose(model(tokens).logits, whole)
    assert torch.equal(model(tokens).logits, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_leaves_what_was_never_there_alone(family, tokens):
    model, direction = tiny_model(family), unit_rows(1, D)[0]
    with ablate(model, direction):
        once = model(tokens).logits
        with ablate(model, direction):
            torch.testing.assert_close(model(tokens).logits, once, rtol=1e-6, atol=1e-6)


def test_nested_ablations_remove_the_joint_span(llama, tokens):
    one, two = torch.linalg.qr(unit_rows(2, D).T).Q.T
    with ablate(llama, torch.stack([one, two])):
        both = llama(tokens).logits
    with ablate(llama, one), ablate(llama, two):
        torch.testing.assert_close(llama(tokens).logits, both, rtol=1e-6, atol=1e-6)


def test_a_dependent_direction_adds_nothing(llama, tokens):
    rows = unit_rows(2, D)
    with ablate(llama, rows):
        expected = llama(tokens).logits
    with ablate(llama, torch.cat([rows, 5 * rows[:1] - 2 * rows[1:]])):
        torch.testing.assert_close(llama(tokens).logits, expected, rtol=1e-6, atol=1e-6)


def test_ablation_ends_after_an_exception(llama, tokens):
    whole = llama(tokens).logits
    with pytest.raises(RuntimeError), ablate(llama, unit_rows(1, D)[0]):
        raise RuntimeError
    assert torch.equal(llama(tokens).logits, whole)
    assert not any(module._forward_hooks for module in llama.modules())


def test_a_steering_vector_survives_ablation_where_it_is_added(llama, tokens):
    vector = 4 * unit_rows(1, D)[0]
    with ablate(llama, vector), steer(llama, layer=2, vector=vector):
        (h,) = residuals(llama, lambda: llama(tokens), 2)
    torch.testing.assert_close(h @ vector / 4, torch.full(tokens.shape, 4.0, dtype=h.dtype))


EDITABLE = [family for family in FAMILIES if family not in ("Gemma2", "Gemma3", "Olmo2")]


@pytest.mark.parametrize("family", EDITABLE)
def test_an_ablated_copy_computes_what_ablation_does(family, tokens, tmp_path):
    model, directions = tiny_model(family), unit_rows(2, D)
    whole = model(tokens).logits
    copied = ablated_copy(model, directions)
    with ablate(model, directions):
        expected = model(tokens).logits
    torch.testing.assert_close(copied(tokens).logits, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model(tokens).logits, whole)
    copied.save_pretrained(tmp_path)
    loaded = type(copied).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-6, atol=1e-6)


def test_a_copy_of_a_tied_model_reads_out_with_its_own_weights(tokens):
    model = tiny_model("Llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    copied = ablated_copy(model, unit_rows(1, D))
    with ablate(model, unit_rows(1, D)):
        torch.testing.assert_close(copied(tokens).logits, model(tokens).logits, rtol=1e-6, atol=1e-6)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3", "Olmo2"])
def test_no_copy_where_a_norm_follows_the_writer(family):
    with pytest.raises(ValueError, match=r"use ablate\(\)"):
        ablated_copy(tiny_model(family), unit_rows(1, D))


@pytest.mark.parametrize(
    "directions",
    [torch.zeros(D), torch.ones(D + 1), torch.ones(2, 2, D), torch.full((D,), float("nan")), torch.ones(0, D)],
)
def test_bad_directions_are_refused(directions, llama):
    with pytest.raises(ValueError, match="direction"), ablate(llama, directions):
        pass


ONE = unit_rows(1, D)[0]


@pytest.mark.parametrize(
    "given",
    [
        ONE.numpy(),
        ONE.tolist(),
        [*ONE],
        ONE.numpy()[None],
        ONE.clone().requires_grad_(),
        ONE.numpy()[::-1].copy()[::-1],
        ONE.to_sparse(),
    ],
    ids=["array", "list", "list of tensors", "row", "requires_grad", "strided", "sparse"],
)
def test_vectors_and_directions_of_many_kinds(llama, tokens, given):
    for change in (lambda values: steer(llama, layer=1, vector=values), lambda values: ablate(llama, values)):
        with change(ONE):
            expected = llama(tokens).logits
        with torch.no_grad(), change(given):
            assert torch.equal(llama(tokens).logits, expected)


@pytest.mark.parametrize(
    "given",
    [
        "a vector",
        slice(2),
        None,
        ["1", "x"],
        [[1.0, 2.0], [3.0]],
        [ONE, ONE[:5]],
        ONE > 0,
        ONE + 0j,
        np.array(ONE + 0j),
        torch.zeros(0, D),
        {"a": 1},
        ONE.to("meta"),
    ],
    ids=str,
)
def test_what_is_no_vector_is_named(llama, given):
    for context in (steer(llama, layer=1, vector=given), ablate(llama, given)):
        with pytest.raises(ValueError, match=r"got a \w+ .*expected"), context:
            pass


def test_whole_numbers_are_numbers(llama, tokens):
    whole = torch.arange(D) % 3
    with steer(llama, layer=1, vector=whole.double()):
        expected = llama(tokens).logits
    with steer(llama, layer=1, vector=whole.numpy()):
        assert torch.equal(llama(tokens).logits, expected)


def test_an_entry_beyond_float16_is_refused_before_any_pass():
    model, vector = tiny_model("Llama", dtype=torch.float16), 70_000 * torch.eye(D)[3]
    context = steer(model, layer=1, vector=vector)
    with pytest.raises(ValueError, match=r"7e\+04, is beyond the range of torch.float16"), context:
        pass
    with steer(tiny_model("Llama", dtype=torch.bfloat16), layer=1, vector=vector):
        pass


def test_a_residual_beyond_float16_is_refused(tokens):
    model = tiny_model("Llama", dtype=torch.float16)
    big = 60_000 * torch.eye(D)[3]
    with steer(model, layer=1, vector=big):
        model(tokens)
        with pytest.raises(ValueError, match="residual is beyond float16's range"), steer(model, layer=1, vector=big):
            model(tokens)


def test_an_entry_beyond_the_range_of_the_pass_is_refused(llama, tokens):
    """A model in float64, of which autocast or a cast block makes float16."""
    with steer(llama, layer=1, vector=70_000 * torch.eye(D)[3]):
        llama(tokens)
        with pytest.raises(ValueError, match=r"beyond the range of torch.float16"):
            get_blocks(llama)[1](torch.zeros(1, 1, D, dtype=torch.float16))


@pytest.mark.parametrize("length", [1e-300, 1e-42, 1e30, 1e300])
def test_lengths_of_directions_do_not_matter(tokens, length):
    model = tiny_model("Llama", dtype=torch.float32)
    with ablate(model, unit_rows(2, D)):
        expected = model(tokens).logits
    with ablate(model, length * unit_rows(2, D)):
        torch.testing.assert_close(model(tokens).logits, expected)


@pytest.mark.parametrize("first", ["steer", "ablate"])
def test_a_vector_at_the_embeddings_survives_ablation_in_either_order(llama, tokens, first):
    vector = 4 * unit_rows(1, D)[0]
    contexts = [steer(llama, layer=0, vector=vector), ablate(llama, vector)]
    one, other = contexts if first == "steer" else reversed(contexts)
    with one, other:
        (h,) = residuals(llama, lambda: llama(tokens), 0)
    torch.testing.assert_close(h @ vector / 4, torch.full(tokens.shape, 4.0, dtype=h.dtype))
