import copy
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import (
    BLOCKS,
    assert_near,
    compile_blocks,
    full_model_map,
    replace_blocks,
    tiny_model,
    tiny_tokenizer,
    unit_rows,
)

from dctlib import CausalMap, Transcoder, ablate, fit_exponential, score_vectors, steer
from dctlib.maps.replay import activations

SLICES = [(0, 2), (1, 3), (2, BLOCKS)]  # first block, middle, through the last block before the final norm
D = 32


@pytest.mark.parametrize(("source", "target"), SLICES)
def test_value_equals_the_hooked_full_model(family_model, tokenizer, texts, source, target):
    cmap = CausalMap.from_model(family_model, tokenizer, texts, source=source, target=target, positions=3)
    delta = full_model_map(family_model, tokenizer, texts, source, target, 3)
    theta = 3 * unit_rows(4, D)
    expected = torch.stack([delta(row) for row in theta])
    assert_near(cmap(theta), expected, 1e-6)
    assert expected.norm() > 0.1


@pytest.mark.parametrize(("source", "target"), SLICES)
def test_first_derivatives_equal_differences_of_the_full_model(family_model, tokenizer, texts, source, target):
    cmap = CausalMap.from_model(family_model, tokenizer, texts, source=source, target=target)
    delta = full_model_map(family_model, tokenizer, texts, source, target, 3)
    theta, v, u = unit_rows(1, D, seed=1), unit_rows(1, D, seed=2), unit_rows(1, D, seed=3)

    def slope(step):
        return (delta(theta[0] + step * v[0]) - delta(theta[0] - step * v[0])) / (2 * step)

    jv = cmap.jvp(theta, v)
    assert_near(jv[0], (4 * slope(0.03) - slope(0.06)) / 3, 1e-4)
    assert_near((u * jv).sum(), (cmap.vjp(theta, u) * v).sum(), 1e-5)
    assert_near(cmap.vjp_at_zero(u), cmap.vjp(0 * theta, u), 1e-12)


@pytest.mark.parametrize(("source", "target"), SLICES)
def test_second_derivatives_equal_differences_of_the_full_model(family_model, tokenizer, texts, source, target):
    cmap = CausalMap.from_model(family_model, tokenizer, texts, source=source, target=target)
    delta = full_model_map(family_model, tokenizer, texts, source, target, 3)
    v, w, u = unit_rows(1, D, seed=4), unit_rows(1, D, seed=5), unit_rows(1, D, seed=6)

    def mixed(step):
        a, b = step * v[0], step * w[0]
        return (delta(a + b) - delta(a - b) - delta(b - a) + delta(-a - b)) / (4 * step**2)

    expected = (4 * mixed(0.1) - mixed(0.2)) / 3  # Richardson
    found = cmap.second_derivative(v, w)[0]
    assert_near(found, expected, 0.01)
    assert_near((cmap.second_derivative_vjp(u, v) * w).sum(), (u * found).sum(), 1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_any_attention_and_it_is_put_back(tokenizer, texts, attention):
    model = tiny_model("Llama", attention=attention)
    cmap = CausalMap.from_model(model, tokenizer, texts, source=1, target=3)
    reference = CausalMap.from_model(tiny_model("Llama"), tokenizer, texts, source=1, target=3)
    v = unit_rows(2, D)
    torch.testing.assert_close(cmap.second_derivative(v, v), reference.second_derivative(v, v))
    assert model.config._attn_implementation == attention
    assert not any(block._forward_pre_hooks for block in model.model.layers)


def test_training_mode_is_put_back(llama, tokenizer, texts):
    llama.train()
    cmap = CausalMap.from_model(llama, tokenizer, texts, source=0, target=2)
    cmap(unit_rows(1, D))
    assert all(module.training for module in llama.modules())


def test_batched_equals_one_at_a_time_and_chunks_agree(llama, tokenizer, texts):
    whole, chunked = (CausalMap.from_model(llama, tokenizer, texts, source=1, target=3) for _ in range(2))
    whole.chunk_size, chunked.chunk_size = 16, 3
    theta, v, u = unit_rows(7, D, seed=1), unit_rows(7, D, seed=2), unit_rows(7, D, seed=3)
    for product in (
        lambda cmap, rows: cmap(theta[rows]),
        lambda cmap, rows: cmap.jvp(theta[rows], v[rows]),
        lambda cmap, rows: cmap.vjp(theta[rows], u[rows]),
        lambda cmap, rows: cmap.vjp_at_zero(u[rows]),
        lambda cmap, rows: cmap.second_derivative(theta[rows], v[rows]),
        lambda cmap, rows: cmap.second_derivative_vjp(u[rows], v[rows]),
    ):
        together = product(whole, slice(None))
        assert_near(product(chunked, slice(None)), together, 1e-6)
        one_by_one = torch.cat([product(whole, slice(i, i + 1)) for i in range(7)])
        assert_near(one_by_one, together, 1e-6)


def test_compiled_blocks_give_the_same(llama, tokenizer, texts, monkeypatch):
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))  # inductor needs a C++ compiler
    torch._dynamo.reset()
    plain, compiled = (
        CausalMap.from_model(llama, tokenizer, texts, source=1, target=3, compiled=kind) for kind in (False, True)
    )
    plain.chunk_size = compiled.chunk_size = 3
    first, second = unit_rows(2, 7, D)
    for product in ("vjp", "jvp", "second_derivative", "second_derivative_vjp"):
        assert_near(getattr(compiled, product)(first, second), getattr(plain, product)(first, second), 1e-6)
    for product in ("__call__", "vjp_at_zero"):
        assert_near(getattr(compiled, product)(first), getattr(plain, product)(first), 1e-6)
    assert graphs


def add_adapter(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()


@pytest.mark.parametrize("wrap", [compile_blocks, replace_blocks, add_adapter], ids=lambda f: f.__name__)
def test_wrapped_models_that_have_run_before(tokenizer, texts, wrap):
    torch._dynamo.reset()
    wrapped = wrap(tiny_model("Llama"))
    plain = tiny_model("Llama") if wrap is not add_adapter else copy.deepcopy(wrapped).merge_and_unload()
    wrapped(torch.tensor([[6, 7, 8]]))
    theta, v = unit_rows(2, 2, D)
    maps = [CausalMap.from_model(model, tokenizer, texts, source=1, target=3) for model in (wrapped, plain)]
    assert_near(maps[0](theta), maps[1](theta), 1e-9)
    assert_near(maps[0].second_derivative(theta, v), maps[1].second_derivative(theta, v), 1e-6)
    scores = [score_vectors(m, tokenizer, texts, theta, layer=1, progress=False) for m in (wrapped, plain)]
    assert_near(scores[0], scores[1], 1e-6)


def test_prompts_of_unequal_length_equal_one_by_one(llama, tokenizer, texts):
    theta = unit_rows(3, D)
    together = CausalMap.from_model(llama, tokenizer, texts, source=1, target=3)(theta)
    alone = [CausalMap.from_model(llama, tokenizer, [text], source=1, target=3)(theta) for text in texts]
    assert_near(together, torch.stack(alone).mean(0), 1e-6)


def test_layers_that_pass_no_gradient_on_are_refused(llama, tokenizer, texts, monkeypatch):
    """As int8 weights with quantised activations do, without an error."""
    projection = llama.model.layers[2].mlp.down_proj
    monkeypatch.setattr(projection, "forward", lambda x: torch.nn.functional.linear(x.detach(), projection.weight))
    monkeypatch.setattr(llama.model.layers[1], "forward", _without_gradient(llama.model.layers[1].forward))
    cmap = CausalMap.from_model(llama, tokenizer, texts, source=1, target=3)
    assert cmap(unit_rows(1, D)).norm() > 0
    for product in (cmap.vjp, cmap.jvp, cmap.second_derivative):
        with pytest.raises(ValueError, match=r"not its slopes|cannot be differentiated"):
            product(unit_rows(1, D), unit_rows(1, D))


def _without_gradient(forward):
    def detached(hidden, *args, **kwargs):
        output = forward(hidden.detach(), *args, **kwargs)
        return output - hidden.detach() + hidden  # the residual alone has one

    return detached


def test_value_and_vjp_is_both(llama, tokenizer, texts):
    cmap = CausalMap.from_model(llama, tokenizer, texts, source=1, target=3)
    theta, u = unit_rows(3, D), unit_rows(3, D, seed=1)
    value, gradient = cmap.value_and_vjp(theta, u)
    torch.testing.assert_close(value, cmap(theta))
    torch.testing.assert_close(gradient, cmap.vjp(theta, u))


def test_a_memory_budget_bounds_the_chunk_and_changes_no_factor(llama, tokenizer, texts):
    roomy, tight = (
        CausalMap.from_model(llama, tokenizer, texts, source=1, target=3, memory=gib) for gib in (1.0, 1e-9)
    )
    assert roomy.chunk_size > tight.chunk_size == 1
    fits = [fit_exponential(m, num_factors=5, input_scale=5.0, iterations=3, progress=False) for m in (roomy, tight)]
    torch.testing.assert_close(fits[0].V, fits[1].V)


def growth(memory, *, rows, tokens):
    """How much a product of so many factors adds to the peak memory of this process, in MiB."""
    import resource  # there is none on Windows

    model, tokenizer = tiny_model("Llama", dtype=torch.float32), tiny_tokenizer()
    cmap = CausalMap.from_model(model, tokenizer, ["w1 " * tokens], source=1, target=3, memory=memory)
    theta = unit_rows(rows, D).float()
    cmap.value_and_vjp(theta[:1], theta[:1])  # what the first product takes for good
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cmap.value_and_vjp(theta, theta)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
@pytest.mark.parametrize(("rows", "tokens"), [(8192, 30), (24, 900)], ids=["8,192 factors", "a long prompt"])
def test_factors_stream_within_the_budget(rows, tokens):
    context, grown = multiprocessing.get_context("spawn"), {}
    for memory in (1 / 8, 8.0):  # GiB; the second holds all rows at once
        with ProcessPoolExecutor(1, mp_context=context) as pool:  # a fresh process: a peak never falls
            grown[memory] = pool.submit(growth, memory, rows=rows, tokens=tokens).result()
    assert grown[1 / 8] < 128
    assert grown[8.0] > 2 * 128


def test_a_map_may_compute_on_copies_of_its_blocks(tokenizer, texts):
    """As on a GPU beside a model in main memory; tests/test_cuda.py does that."""
    model = tiny_model("Llama")
    own = CausalMap.from_model(model, tokenizer, texts, source=1, target=3)
    copied = CausalMap.from_model(model, tokenizer, texts, source=1, target=3, device="cpu")
    v, w = unit_rows(2, 4, D)
    expected = own(v), own.vjp(v, w), own.second_derivative(v, w)
    assert copied.digest == own.digest
    with torch.no_grad():
        for block in model.model.layers[1:3]:
            block.mlp.down_proj.weight.zero_()
    with pytest.raises(ValueError, match="since this map was built"):
        own(v)
    for found, true in zip((copied(v), copied.vjp(v, w), copied.second_derivative(v, w)), expected, strict=True):
        torch.testing.assert_close(found, true)


def test_zero_gives_zero_and_results_carry_no_graph(llama, tokenizer, texts):
    cmap = CausalMap.from_model(llama, tokenizer, texts, source=1, target=3)
    assert cmap(torch.zeros(2, D)).abs().max() < 1e-12
    assert not cmap(unit_rows(1, D).requires_grad_()).requires_grad


def test_bfloat16_weights_give_float32_results(tokenizer, texts):
    model = tiny_model("Llama", dtype=torch.bfloat16)
    exact = CausalMap.from_model(tiny_model("Llama"), tokenizer, texts, source=1, target=3)
    rounded = CausalMap.from_model(model, tokenizer, texts, source=1, target=3)
    theta = 3 * unit_rows(2, D)
    assert rounded(theta).dtype == torch.float32
    assert (rounded(theta) - exact(theta)).norm() < 0.05 * exact(theta).norm()


def test_layers_may_be_numpys(llama, tokenizer, texts, tmp_path):
    cmap = CausalMap.from_model(llama, tokenizer, texts, source=np.int64(1), target=np.int64(3))  # pyright: ignore[reportArgumentType]
    fit_exponential(cmap, num_factors=2, input_scale=1.0, iterations=1).save(tmp_path / "one")
    assert (Transcoder.load(tmp_path / "one").source, cmap.target) == (1, 3)


def test_hooks_are_gone_after_an_exception(llama, tokenizer, texts, monkeypatch):
    monkeypatch.setattr(llama.model.layers[3], "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ValueError, match="cannot be replayed"):
        CausalMap.from_model(llama, tokenizer, texts, source=0, target=2)
    assert not any(block._forward_pre_hooks for block in llama.model.layers)
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": -1, "target": 2}, "source=-1"),
        ({"source": 4, "target": 5}, "from 0 to 3"),
        ({"source": 2, "target": 2}, "source < target"),
        ({"source": 0, "target": 5}, "target <= 4"),
        ({"source": 0, "target": 2, "positions": 0}, "positions=0"),
        ({"source": 0, "target": 2, "positions": 5}, "fewer than positions=5"),
        ({"source": 0, "target": 2, "memory": 0.0}, "memory=0.0"),
    ],
)
def test_bad_options_are_named(llama, tokenizer, texts, options, message):
    with pytest.raises(ValueError, match=message):
        CausalMap.from_model(llama, tokenizer, texts, **options)


@pytest.mark.parametrize("bad", [[], "w0 w1 w2", [""], [3]])
def test_bad_texts(llama, tokenizer, bad):
    with pytest.raises(ValueError, match="got"):
        CausalMap.from_model(llama, tokenizer, bad, source=0, target=2)


def test_activations_that_are_not_finite(llama, tokenizer, texts):
    llama.model.layers[1].mlp.down_proj.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        CausalMap.from_model(llama, tokenizer, texts, source=0, target=3)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 3), width=st.integers(1, 40), ndim=st.integers(1, 3))
def test_shapes_are_checked_before_any_work(shared_cmap, rows, width, ndim):
    theta = torch.zeros((1,) * (ndim - 2) + ((rows, width) if ndim > 1 else (width,)), dtype=torch.float64)
    if theta.ndim == 2 and width == D and rows:
        assert shared_cmap(theta).shape == (rows, D)
    else:
        with pytest.raises(ValueError, match="expected"):
            shared_cmap(theta)


def test_rows_must_match(shared_cmap):
    with pytest.raises(ValueError, match="one row of each"):
        shared_cmap.vjp(torch.zeros(2, D), torch.zeros(3, D))


@pytest.fixture(scope="module")
def shared_cmap(tokenizer, texts):
    return CausalMap.from_model(tiny_model("Llama"), tokenizer, texts, source=1, target=3)


def test_the_digest_sees_weights_prompts_slice_and_positions(tokenizer, texts):
    def digest(model, texts=texts, source=1, target=3, positions=3):
        return CausalMap.from_model(model, tokenizer, texts, source=source, target=target, positions=positions).digest

    model, moved, rescaled = tiny_model("Llama"), tiny_model("Llama"), tiny_model("Llama")
    with torch.no_grad():
        moved.model.layers[3].mlp.down_proj.weight[0, 0] += 1e-9
    rescaled.config.rope_parameters["rope_theta"] = 5.0
    same = digest(model)
    assert digest(model) == same
    others = [
        digest(moved),
        digest(rescaled),
        digest(model, texts[:2]),
        digest(model, target=4),
        digest(model, positions=2),
    ]
    assert len({same, *others}) == 6


def test_the_digest_does_not_depend_on_threads(tokenizer, texts):
    model, threads, found = tiny_model("Llama", dtype=torch.float32), torch.get_num_threads(), set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.add(CausalMap.from_model(model, tokenizer, texts, source=1, target=3).digest)
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_a_map_inside_steer_is_that_of_the_steered_model(tokenizer, texts):
    model, base, vectors = tiny_model("Llama"), 3 * unit_rows(1, 32)[0], 2 * unit_rows(2, 32, seed=1)
    with steer(model, layer=1, vector=base):
        found = CausalMap.from_model(model, tokenizer, texts, source=1, target=3)(vectors)
        scores = score_vectors(model, tokenizer, texts, vectors, layer=1, progress=False)
    plain = CausalMap.from_model(model, tokenizer, texts, source=1, target=3)
    torch.testing.assert_close(found, plain(base + vectors) - plain(base[None]))
    torch.testing.assert_close(scores, score_vectors(model, tokenizer, texts, base + vectors, layer=1, progress=False))


def test_activations_are_means_of_the_full_models_hidden_states(llama, tokenizer, texts):
    found = activations(llama, tokenizer, texts, layer=2, positions=2)
    assert found.shape == (3, 32)
    for text, row in zip(texts, found, strict=True):
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        expected = llama(tokens, output_hidden_states=True).hidden_states[2][0, -2:].mean(0)
        torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-5)


def test_activations_name_bad_input(llama, tokenizer, texts):
    with pytest.raises(ValueError, match="expected 1 to 4"):
        activations(llama, tokenizer, texts, layer=2, positions=5)
    with pytest.raises(ValueError, match="in a list"):
        activations(llama, tokenizer, texts[0], layer=2)
    with pytest.raises(ValueError, match="layer=9"):
        activations(llama, tokenizer, texts, layer=9)


def changed(model, change):
    """A context in which a model differs from itself before."""
    if change == "steered below the slice":
        return steer(model, layer=0, vector=unit_rows(1, D)[0])
    if change == "ablated":
        return ablate(model, unit_rows(1, D)[0])
    with torch.no_grad():
        next(model.model.layers[2].parameters()).mul_(0.5)
    return nullcontext()


@pytest.mark.parametrize("change", ["steered below the slice", "ablated", "edited"])
def test_a_map_is_refused_for_a_model_that_changed(tokenizer, texts, change):
    model = tiny_model("Llama")
    cmap = CausalMap.from_model(model, tokenizer, texts, source=1, target=3)
    with changed(model, change), pytest.raises(ValueError, match="since this map was built"):
        cmap(unit_rows(2, D))
    if change != "edited":
        cmap(unit_rows(2, D))


def test_a_map_that_was_built_inside_steer_is_refused_outside_and_has_no_digest(tokenizer, texts):
    model = tiny_model("Llama")
    with steer(model, layer=1, vector=unit_rows(1, D)[0]):
        cmap = CausalMap.from_model(model, tokenizer, texts, source=1, target=3)
        with pytest.raises(ValueError, match="fit without a cache there"):
            _ = cmap.digest
    with pytest.raises(ValueError, match="since this map was built"):
        cmap.jvp(unit_rows(2, D), unit_rows(2, D))


def test_a_map_is_refused_once_an_adapter_is_switched_off(tokenizer, texts):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model: Any = get_peft_model(tiny_model("Llama"), config)
    cmap = CausalMap.from_model(model, tokenizer, texts, source=1, target=3)
    value = cmap(unit_rows(2, D))
    with model.disable_adapter(), pytest.raises(ValueError, match="since this map was built"):
        cmap(unit_rows(2, D))
    torch.testing.assert_close(cmap(unit_rows(2, D)), value)


@pytest.mark.parametrize("built_inside", [False, True])
def test_inference_mode_changes_no_product(llama, tokenizer, texts, built_inside):
    theta, v = unit_rows(2, D), unit_rows(2, D, seed=1)
    cmap = CausalMap.from_model(llama, tokenizer, texts, source=1, target=3)
    expected = [cmap.jvp(theta, v), cmap.vjp(theta, v), cmap.second_derivative(theta, v)]
    with torch.inference_mode():
        if built_inside:
            cmap = CausalMap.from_model(llama, tokenizer, texts, source=1, target=3)
        rows = 1 * theta  # a tensor of inference mode
        found = [cmap.jvp(rows, v), cmap.vjp(rows, v), cmap.second_derivative(rows, v)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_learned_tokens_before_a_prompt_are_refused(tokenizer, texts, config):
    model = get_peft_model(tiny_model("Llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    with pytest.raises(ValueError, match="learned tokens before every prompt"):
        CausalMap.from_model(model, tokenizer, texts, source=1, target=3)
    with pytest.raises(ValueError, match="learned tokens before every prompt"):
        score_vectors(model, tokenizer, texts, torch.zeros(1, D), layer=1)


def test_tokens_and_positions_that_the_model_lacks_are_named(llama, texts):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError, match=r"token ids \[64\], and the model has embeddings for 64"):
        CausalMap.from_model(llama, tokenizer, ["new w1 w2 w3"], source=1, target=3)
    with pytest.raises(ValueError, match=r"token ids \[64\]"):
        score_vectors(llama, tokenizer, texts, torch.zeros(1, D), layer=1, positive="new")
    with pytest.raises(ValueError, match="cannot run a prompt of 70 tokens"):
        CausalMap.from_model(tiny_model("GPT2"), tokenizer, ["w1 " * 70], source=1, target=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_call_of_the_fused_layer_norm_is_differentiated_rightly(tokenizer, texts, dtype):
    class Norm(torch.nn.LayerNorm):
        def forward(self, input):
            return torch.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    v = unit_rows(3, D)
    exact = CausalMap.from_model(tiny_model("GPT2"), tokenizer, texts, source=1, target=3).second_derivative(v, v)
    model = tiny_model("GPT2", dtype=dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.__class__ = Norm
    found = CausalMap.from_model(model, tokenizer, texts, source=1, target=3).second_derivative(v, v)
    assert_near(found.double(), exact, 0.05 if dtype == torch.bfloat16 else 1e-4)
