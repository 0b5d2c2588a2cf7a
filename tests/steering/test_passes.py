"""Steering and ablation of models that are compiled, wrapped, or leave hooks out; the plain model is the reference."""

from typing import Any

import pytest
import torch
from tiny import compile_blocks, hooked_residual, replace_blocks, tiny_model, unit_rows
from transformers import CompileConfig

from dctlib import ablate, steer
from dctlib.models.blocks import get_blocks, unwrap
from dctlib.models.plain_copy import plain_copy
from dctlib.steering.hooks import ablated_copy

D = 32
TOKENS = torch.tensor([[6, 7, 8, 9, 10]])
VECTOR = 3 * unit_rows(1, D)[0]


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def stack(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


def forward_of_blocks(model):
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, backend="eager")
    return model


def sublayers(model):
    for block in model.model.layers:
        block.mlp = torch.compile(block.mlp, backend="eager")
        block.self_attn.compile(backend="eager")
    return model


KINDS = [whole, in_place, forward, stack, compile_blocks, replace_blocks, forward_of_blocks, sublayers]


def generated(model, **options):
    return model.generate(TOKENS, max_new_tokens=2, min_new_tokens=2, do_sample=False, **options)


def short_model():
    """Two blocks, because tracing takes most of the time here."""
    model = tiny_model("Llama")
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    return model


@pytest.fixture
def compiled(request):
    torch._dynamo.reset()
    yield request.param(short_model())
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", KINDS, indirect=True)
def test_compiled_models_are_changed_inside_and_clean_afterwards(compiled):
    plain = short_model()
    clean = plain(TOKENS).logits
    torch.testing.assert_close(compiled(TOKENS).logits, clean)
    for context in (lambda model: steer(model, layer=1, vector=VECTOR), lambda model: ablate(model, VECTOR)):
        with context(plain):
            expected, text = plain(TOKENS).logits, generated(plain)
        with context(compiled):
            torch.testing.assert_close(compiled(TOKENS).logits, expected)
            assert torch.equal(generated(compiled), text)
        torch.testing.assert_close(compiled(TOKENS).logits, clean)


@pytest.mark.parametrize("compiled", [in_place], indirect=True)
def test_what_is_compiled_or_generated_first_inside_is_clean_afterwards(compiled):
    plain = short_model()
    clean = generated(plain)
    with steer(plain, layer=1, vector=VECTOR):
        expected = generated(plain)
    assert not torch.equal(expected, clean)
    with steer(compiled, layer=1, vector=VECTOR):
        assert torch.equal(generated(compiled), expected)
    assert torch.equal(generated(compiled), clean)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_compiled_model_is_plain(kind, llama):
    with ablate(llama, VECTOR):
        expected = llama(TOKENS).logits
    copied = ablated_copy(kind(tiny_model("Llama")), VECTOR)
    assert copied.state_dict().keys() == llama.state_dict().keys()
    assert not any(module._compiled_call_impl or "forward" in vars(module) for module in copied.modules())
    torch.testing.assert_close(copied(TOKENS).logits, expected)


def test_a_compiled_call_that_generate_keeps_is_not_copied(llama):
    llama._compiled_call = llama.__call__  # what transformers keeps, bound to this model
    assert "_compiled_call" not in vars(ablated_copy(llama, VECTOR))


def test_a_copy_inside_a_context_is_refused(llama):
    for context in (steer(llama, layer=1, vector=VECTOR), ablate(llama, VECTOR)):
        with context, pytest.raises(ValueError, match="copy it outside the context"):
            ablated_copy(llama, VECTOR)
    ablated_copy(llama, VECTOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_a_copy_is_held_to_the_model_in_its_own_type(dtype, family):
    model = tiny_model(family, dtype=dtype)
    copied = ablated_copy(model, VECTOR)
    assert copied.dtype == dtype

    def damaged(self, *args, **kwargs):
        copied = plain_copy(self)
        copied.get_parameter("lm_head.weight").mul_(1.1)
        return copied

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("dctlib.steering.hooks.plain_copy", damaged)
        with pytest.raises(ValueError, match="gives other logits than ablate"):
            ablated_copy(model, VECTOR)


def test_a_compiled_function_around_the_model_is_changed_too():
    torch._dynamo.reset()
    model = short_model()
    step = torch.compile(lambda tokens: model(tokens).logits, backend="eager")
    clean, expected = step(TOKENS), hooked_residual(model, TOKENS, 1, 2, VECTOR)
    with steer(model, layer=1, vector=VECTOR):
        torch.testing.assert_close(step(TOKENS), model.lm_head(model.model.norm(expected)))
    torch.testing.assert_close(step(TOKENS), clean)


def test_generate_that_compiles_itself_is_changed_inside_and_clean_afterwards():
    torch._dynamo.reset()
    model = short_model()
    compiling: Any = CompileConfig(backend="eager", fullgraph=False)
    compiling._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiling}
    clean = generated(model)
    with steer(model, layer=1, vector=VECTOR):
        expected = generated(model)
        assert torch.equal(generated(model, **options), expected)
    assert hasattr(model, "_compiled_call")
    assert torch.equal(generated(model, **options), clean)
    with steer(model, layer=1, vector=VECTOR):
        assert torch.equal(generated(model, **options), expected)


@pytest.mark.parametrize("change", ["steer", "ablate"])
def test_a_pass_that_leaves_the_hook_out_is_refused(llama, change):
    """As a captured graph does: the block's forward runs, and its call does not."""
    with ablate(llama, VECTOR):  # the layout is known from now on
        replayed = llama(TOKENS)
    llama.forward = lambda *_args, **_kwargs: replayed
    context = steer(llama, layer=1, vector=VECTOR) if change == "steer" else ablate(llama, VECTOR)
    with pytest.raises(ValueError, match="LlamaForCausalLM ran without"), context:
        llama(TOKENS)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in llama.modules())


def test_a_dropped_block_is_refused_and_a_draft_by_the_first_blocks_is_not(llama):
    with steer(llama, layer=3, vector=VECTOR):
        expected = generated(llama)
        assert torch.equal(generated(llama, assistant_early_exit=2), expected)
    llama.model.layers[3].__class__.__call__ = property(lambda self: self.forward)  # calls no hook
    try:
        with pytest.raises(ValueError, match="the first on a LlamaDecoderLayer"), steer(llama, layer=3, vector=VECTOR):
            llama(TOKENS)
    finally:
        del llama.model.layers[3].__class__.__call__


def test_gradient_checkpointing_is_refused_where_it_would_run_blocks_again(llama):
    llama.gradient_checkpointing_enable()
    llama.train()
    with steer(llama, layer=1, vector=VECTOR):
        with torch.no_grad():
            llama(TOKENS, use_cache=False)
        with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
            llama(TOKENS, use_cache=False)
        llama.eval()
        llama(TOKENS)


def test_gradients_reach_a_steering_vector(llama):
    vector = VECTOR.clone().requires_grad_()
    with steer(llama, layer=1, vector=vector):
        llama(TOKENS).logits[0, -1, 0].backward()

    def logit(moved):
        return llama.lm_head(llama.model.norm(hooked_residual(llama, TOKENS, 1, 4, moved)))[0, -1, 0]

    step = 1e-2 * unit_rows(1, D, seed=3)[0]  # norms round to float32, which smaller steps would measure
    change = (logit(VECTOR + step) - logit(VECTOR - step)).item() / 2
    assert vector.grad is not None
    assert abs((vector.grad @ step).item() - change) < 1e-3 * abs(change)


def test_data_parallel_models_are_changed(llama):
    model = torch.nn.DataParallel(tiny_model("Llama"))
    rows = torch.stack([VECTOR, -VECTOR])
    for context in (lambda m: steer(m, layer=2, vector=rows), lambda m: ablate(m, VECTOR)):
        with context(llama):
            expected = llama(TOKENS.expand(2, -1)).logits
        with context(model):
            torch.testing.assert_close(model(TOKENS.expand(2, -1)).logits, expected)
    torch.testing.assert_close(model(TOKENS).logits, llama(TOKENS).logits)


def test_rows_are_refused_where_several_devices_share_a_batch(llama):
    model = torch.nn.DataParallel(llama)
    model.device_ids = [0, 1]
    with pytest.raises(ValueError, match="over 2 devices"), steer(model, layer=1, vector=unit_rows(2, D)):
        pass
    with pytest.raises(ValueError, match="over 2 devices"), steer(model, layer=1, vector=VECTOR, positions="prompt"):
        pass
    with steer(model, layer=1, vector=VECTOR):
        pass


@pytest.mark.parametrize("given", [torch.nn.Linear(2, 2), slice(2), None])
def test_what_is_no_model_is_named(given):
    for context in (steer(given, layer=1, vector=VECTOR), ablate(given, VECTOR)):
        with pytest.raises(ValueError, match="expected a transformers language model"), context:
            pass


def test_embeddings_that_the_model_is_given_are_ablated(llama):
    embeddings = llama.get_input_embeddings()(TOKENS)
    with ablate(llama, VECTOR):
        expected = llama(TOKENS).logits
        torch.testing.assert_close(llama(inputs_embeds=embeddings).logits, expected)
        torch.testing.assert_close(llama(None, None, None, None, embeddings).logits, expected)


def test_blocks_run_alone_keep_a_vector_that_they_are_given(llama, tokenizer):
    """A replay inside ablation adds its vector behind it, as steer does."""
    from dctlib import score_vectors

    options = {"layer": 0, "progress": False}
    with ablate(llama, VECTOR):
        scores = score_vectors(llama, tokenizer, ["w0 w1 w2"], VECTOR[None], **options)
        tokens = tokenizer("w0 w1 w2", return_tensors="pt")["input_ids"]
        with steer(llama, layer=0, vector=VECTOR):
            logits = llama(tokens).logits[0, -1, [4, 5]]
    torch.testing.assert_close(scores[0].double(), logits[0] - logits[1], rtol=1e-5, atol=1e-5)
    assert get_blocks(unwrap(llama))[0]._forward_pre_hooks == {}


def test_continuous_batching_that_remembers_is_refused_before_and_forgotten_afterwards(llama):
    """A manager keeps states of prompts and, on a GPU, graphs."""
    stopped = []
    llama.destroy_cached_continuous_batching_manager = lambda: stopped.append(
        vars(llama).pop("_cached_continuous_batching_manager")
    )
    with steer(llama, layer=1, vector=VECTOR):
        llama._cached_continuous_batching_manager = "made inside"
    assert stopped == ["made inside"]
    with steer(llama, layer=1, vector=VECTOR):
        pass
    llama._cached_continuous_batching_manager = "made before"
    context = ablate(llama, VECTOR)
    with pytest.raises(ValueError, match=r"destroy_cached_continuous_batching_manager\(\) first"), context:
        pass
    assert stopped == ["made inside"]
