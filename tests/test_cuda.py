"""A GPU gives what a CPU gives, and what does not fit it is done in smaller parts. Skipped where there is no GPU."""

import copy
from typing import Any

import pytest
import torch
from tiny import FAMILIES, assert_near, tiny_model, unit_rows
from transformers import LlamaConfig, LlamaForCausalLM

from dctlib import (
    CausalMap,
    Transcoder,
    ablate,
    calibrate,
    fit_exponential,
    fit_linear,
    fit_quadratic,
    load_model,
    score_vectors,
    steer,
)
from dctlib.steering.effects import effects
from dctlib.steering.generation import generate_completions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

D = 32
AT: dict[str, Any] = {"source": 1, "target": 3}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """A model on the CPU, and its copy on the GPU, both float64."""
    model = tiny_model(request.param)
    return model, copy.deepcopy(model).to("cuda")


@pytest.fixture(scope="module")
def llamas():
    model = tiny_model("Llama")
    return model, copy.deepcopy(model).to("cuda")


def maps_of(pair, tokenizer, texts, **options):
    return [CausalMap.from_model(model, tokenizer, texts, **AT, **options) for model in pair]


@pytest.mark.parametrize("product", ["vjp", "jvp", "second_derivative", "second_derivative_vjp"])
def test_products_of_every_family(pair, tokenizer, texts, product):
    cpu, gpu = maps_of(pair, tokenizer, texts)
    first, second = unit_rows(2, 5, D)
    found = getattr(gpu, product)(first.cuda(), second)
    assert found.is_cuda
    assert_near(found.cpu(), getattr(cpu, product)(first, second), 1e-5)
    assert_near(gpu(3 * first).cpu(), cpu(3 * first), 1e-5)


@pytest.mark.parametrize("product", ["value_and_vjp", "jvp", "second_derivative", "second_derivative_vjp"])
def test_compiled_blocks(llamas, tokenizer, texts, product):
    cpu, gpu = maps_of(llamas, tokenizer, texts)
    compiled = CausalMap.from_model(llamas[1], tokenizer, texts, **AT, compiled=True)
    cpu.chunk_size = gpu.chunk_size = compiled.chunk_size = 3
    first, second = unit_rows(2, 7, D)
    expected, found = (getattr(cmap, product)(first, second) for cmap in (cpu, compiled))
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours.cpu(), theirs, 1e-5)
    assert_near(compiled(first).cpu(), gpu(first).cpu(), 1e-5)
    assert_near(compiled.vjp_at_zero(second).cpu(), cpu.vjp_at_zero(second), 1e-5)


@pytest.mark.parametrize("projections", [None, 8])
def test_linear_fits_agree_up_to_signs(llamas, tokenizer, texts, projections):
    one, other = (
        fit_linear(cmap, num_factors=4, projections=projections, progress=False)
        for cmap in maps_of(llamas, tokenizer, texts)
    )
    signs = (other.V.cpu() * one.V).sum(1, keepdim=True).sign()
    assert_near(other.V.cpu() * signs, one.V, 1e-3)
    assert_near(other.U.cpu() * signs, one.U, 1e-3)
    assert_near(other.alpha.cpu(), one.alpha, 1e-4)


def test_quadratic_fits_agree_up_to_signs(llamas, tokenizer, texts):
    one, other = (
        fit_quadratic(cmap, num_factors=4, iterations=2, progress=False) for cmap in maps_of(llamas, tokenizer, texts)
    )
    assert_near(other.V.cpu() * (other.V.cpu() * one.V).sum(1, keepdim=True).sign(), one.V, 1e-3)
    assert_near(other.U.cpu(), one.U, 1e-3)
    assert_near(other.alpha.cpu(), one.alpha, 1e-3)


@pytest.mark.parametrize("orthogonalise", ["qr", "soft"])
def test_exponential_fits_agree_and_are_kept(llamas, tokenizer, texts, orthogonalise, tmp_path):
    options = {"num_factors": 4, "input_scale": 3.0, "iterations": 2, "init": "random", "progress": False}
    cpu, gpu = maps_of(llamas, tokenizer, texts)
    one, other = (fit_exponential(cmap, **options, orthogonalise=orthogonalise) for cmap in (cpu, gpu))
    assert other.V.is_cuda
    other.save(tmp_path / "fit")
    kept = Transcoder.load(tmp_path / "fit")
    for name in ("U", "V", "alpha"):
        assert_near(getattr(kept, name), getattr(one, name), 1e-3)


def test_a_projected_start_agrees_up_to_signs(llamas, tokenizer, texts):
    """Signs are LAPACK's choice, and factors of an exponential depend on theirs, but at so small a scale."""
    options = {"num_factors": 4, "input_scale": 1e-3, "iterations": 1, "progress": False}
    one, other = (fit_exponential(cmap, **options) for cmap in maps_of(llamas, tokenizer, texts))
    assert_near((other.V.cpu() * one.V).sum(1).abs(), torch.ones(4, dtype=one.V.dtype), 1e-2)


def test_calibration(llamas, tokenizer, texts):
    cpu, gpu = (calibrate(cmap) for cmap in maps_of(llamas, tokenizer, texts))
    assert gpu == pytest.approx(cpu, rel=1e-4)


def test_scores_effects_and_completions_under_vectors_of_either_device(llamas, tokenizer, texts):
    vectors = 3 * unit_rows(4, D)
    for read in (
        lambda model, vectors: score_vectors(model, tokenizer, texts, vectors, layer=1, progress=False),
        lambda model, vectors: effects(model, tokenizer, texts, vectors, layer=1, progress=False).divergence,
    ):
        expected = read(llamas[0], vectors)
        for given in (vectors, vectors.cuda()):
            assert_near(read(llamas[1], given).cpu(), expected, 1e-4)
    for given in (vectors[0], vectors[0].cuda()):
        said = [
            generate_completions(m, tokenizer, texts, max_new_tokens=5, layer=1, vector=given, progress=False)
            for m in llamas
        ]
        assert said[0] == said[1]


def test_ablation_takes_directions_of_either_device_and_nests_with_steering(llamas, tokenizer, texts):
    direction, vector = unit_rows(2, D)
    inputs = tokenizer(texts[0], return_tensors="pt", add_special_tokens=False)["input_ids"]
    logits = []
    for model in llamas:
        for move in (torch.Tensor.cpu, torch.Tensor.cuda):
            with ablate(model, move(direction)), steer(model, layer=1, vector=move(3 * vector)):
                logits.append(model(inputs.to(model.device)).logits.cpu())
    for other in logits[1:]:
        assert_near(other, logits[0], 1e-5)


def test_what_does_not_fit_is_done_in_halves(llamas, tokenizer, texts):
    cpu, gpu = maps_of(llamas, tokenizer, texts)
    cpu.chunk_size = gpu.chunk_size = 4096
    theta, u = (rows.repeat(512, 1) for rows in unit_rows(2, 8, D))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
        with pytest.warns(UserWarning, match="out of memory: going on with chunks of"):
            found = gpu.vjp(theta, u)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= gpu.chunk_size < 4096
    assert_near(found[:8].cpu(), cpu.vjp(theta[:8], u[:8]), 1e-5)
    assert_near(found[-8:].cpu(), cpu.vjp(theta[-8:], u[-8:]), 1e-5)


def test_the_slice_alone_may_lie_on_the_gpu(llamas, tokenizer, texts):
    model = llamas[0]
    cpu = CausalMap.from_model(model, tokenizer, texts, source=1, target=3)
    before = torch.cuda.memory_allocated()
    gpu = CausalMap.from_model(model, tokenizer, texts, source=1, target=3, device="cuda")
    blocks = sum(p.numel() * p.element_size() for block in model.model.layers[1:3] for p in block.parameters())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert blocks <= torch.cuda.memory_allocated() - before < whole
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    v, w = unit_rows(2, 4, D)
    assert_near(gpu(v).cpu(), cpu(v), 1e-5)
    assert_near(gpu.vjp(v, w).cpu(), cpu.vjp(v, w), 1e-5)
    fits = [fit_exponential(m, num_factors=3, input_scale=5.0, iterations=3, progress=False) for m in (cpu, gpu)]
    assert_near(fits[1].V.cpu(), fits[0].V, 1e-4)


@pytest.mark.parametrize("memory", [0.125, 0.5])
def test_a_product_stays_within_its_memory(tokenizer, texts, memory):
    shape = LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=1376, num_hidden_layers=6)
    model: Any = LlamaForCausalLM(shape)
    model.to("cuda", torch.bfloat16).eval().requires_grad_(False)
    cmap = CausalMap.from_model(model, tokenizer, texts, source=1, target=5, memory=memory)
    theta, u = (rows.cuda() for rows in unit_rows(2, 4 * cmap.chunk_size, 512, dtype=torch.float32))
    cmap.vjp(theta[:1], u[:1])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cmap.vjp(theta, u)
    rows = 8 * theta.numel() * theta.element_size()  # what goes in and comes out
    assert torch.cuda.max_memory_allocated() - before <= memory * 2**30 + rows


def test_a_model_is_loaded_onto_the_gpu_in_bfloat16(tmp_path, tokenizer):
    tiny_model("Llama", dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    assert model.device.type == "cuda"
    assert model.dtype == torch.bfloat16
