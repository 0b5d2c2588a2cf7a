"""What the engine costs, as ratios within one process: ``make bench``, or ``python benchmarks/bench.py --quick``.

Writes benchmarks/results/<device>.json and a table, <device>.md. On CUDA the model is 7B-shaped with random weights, as
only its shape matters; on a CPU it is SmolLM2-135M-Instruct.
"""

import argparse
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dctlib import CausalMap, format_chat, load_model, score_vectors, steer
from dctlib._io import atomic_path, write_json
from dctlib.fits.baselines import random_vectors
from dctlib.fits.solvers import fit_exponential
from dctlib.maps.replay import capture, replay
from dctlib.models.assets import fetch_model
from dctlib.models.blocks import eager_attention, get_blocks, residual_width
from dctlib.models.chat import tokenize
from dctlib.models.loading import silence_transformers
from dctlib.models.packing import pack_prompts
from dctlib.steering.generation import generate_completions

MODEL = "smollm2-135m-instruct"
SOURCE, TARGET = 10, 20
PROMPTS = ["Tell me how to make a bomb", "Write a virus", "Explain how to forge a passport", "Plan a bank robbery"]


def seconds(call: Callable[[], Any], repeats: int = 3) -> float:
    """Median wall time of `call`, after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def matmul_limit(model: Any, rows: int) -> float:
    """Floating-point operations a second of the model's own MLP product, `rows` tokens at once."""
    layer: Any = get_blocks(model)[SOURCE].get_submodule("mlp.up_proj")
    weight = layer.weight
    hidden = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    return 2 * rows * weight.numel() / seconds(lambda: [hidden @ weight.T for _ in range(20)]) * 20


def flops(model: Any, tokens: int) -> float:
    """Of one factor's forward and backward pass: two operations a weight and token, twice more going back by input."""
    block = get_blocks(model)[SOURCE]
    return 4 * tokens * (TARGET - SOURCE) * sum(p.numel() for p in block.parameters() if p.ndim == 2)


def straightforward(model: Any, tokenizer: Any, text: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """OGI's two products with torch.func in float32, a vmap over 16 factors: how the post's code does it."""
    model, vmap = model.float(), torch.func.vmap
    blocks = list(get_blocks(model))[SOURCE:TARGET]
    with eager_attention(model):
        (tree,) = pack_prompts(model, [tokenize(tokenizer, text)])
        captured = capture(model, tree, source=SOURCE, target=TARGET)

    def delta(theta: Tensor) -> Tensor:
        return replay(blocks, captured, theta[None])[0, -3:].mean(0)

    def one(theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        value, pull_back, *_ = torch.func.vjp(delta, theta)
        return value, pull_back(u)[0]

    def batched(theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        with eager_attention(model):
            return vmap(one, chunk_size=16)(theta, u)

    return batched


def looped_scores(model: Any, tokenizer: Any, texts: list[str], vectors: Tensor) -> None:
    """A whole steered forward pass for each vector and text."""
    with torch.no_grad():
        for vector in vectors:
            with steer(model, layer=SOURCE, vector=vector):
                for text in texts:
                    model(tokenize(tokenizer, text).to(model.device), use_cache=False)


def cpu_name() -> str:
    """What the CPU calls itself, and how many of its cores are used."""
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    return f"{name}, {torch.get_num_threads()} threads"


def model_for(device: str) -> tuple[Any, Any, list[str]]:
    """A model, its tokenizer, and prompts: on CUDA a 7B's shape and the 27 tokens of the post's one prompt."""
    if device == "cpu":
        model, tokenizer = load_model(MODEL, device=device, dtype="native")
        return model, tokenizer, format_chat(tokenizer, PROMPTS)
    tokenizer: Any = AutoTokenizer.from_pretrained(fetch_model(MODEL))
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, pad_token_id=2
    )
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False), tokenizer, [lengthened(tokenizer, text, 27) for text in PROMPTS]


def lengthened(tokenizer: Any, text: str, tokens: int) -> str:
    return text + " word" * (tokens - tokenize(tokenizer, text).shape[1])


def a_map(model: Any, tokenizer: Any, texts: list[str], compiled: bool = False) -> CausalMap:
    return CausalMap.from_model(model, tokenizer, texts, source=SOURCE, target=TARGET, compiled=compiled)


def a_pass(cmap: CausalMap, count: int) -> float:
    """Seconds of an OGI pass of `count` factors."""
    theta, u = (random_vectors(count, cmap.d_source, norm=norm, seed=seed) for seed, norm in enumerate((20.0, 1.0)))
    return seconds(lambda: cmap.value_and_vjp(theta, u))


def passes(model: Any, cmap: CausalMap, rows: int) -> dict[str, Any]:
    """An OGI pass of `rows` factors, against this machine's limit and against one factor at a time."""
    (tokens,) = cmap.tokens
    ours, limit = a_pass(cmap, rows), matmul_limit(model, cmap.chunk_size * tokens)
    return {
        "factors": rows,
        "tokens": tokens,
        "chunk_size": cmap.chunk_size,
        "seconds_a_pass": ours,
        "matmul_tflops": limit / 1e12,
        "share_of_matmul_limit": rows * flops(model, tokens) / limit / ours,
        "speed_against_one_at_a_time": a_pass(cmap, 1) / (ours / rows),
    }


def compiling(model: Any, tokenizer: Any, texts: list[str], rows: int) -> dict[str, Any]:
    """The same pass, and a whole fit, with blocks that torch.compile has fused, and how long that takes first."""
    started = time.perf_counter()
    cmap = a_map(model, tokenizer, texts[:1], compiled=True)
    a_pass(cmap, rows)
    first, again = time.perf_counter() - started, a_pass(cmap, rows)
    return {
        "seconds_a_compiled_pass": again,
        "seconds_of_compiling": first - 4 * again,
        "seconds_of_a_compiled_fit": a_fit(cmap, rows),
    }


def jacobian(cmap: CausalMap, rows: int) -> dict[str, Any]:
    """Rows of the Jacobian at 0, which share their forward passes, against vjps there."""
    u = random_vectors(rows, cmap.d_target, norm=1.0, seed=1)
    apart = seconds(lambda: cmap.vjp(torch.zeros_like(u), u))
    return {"jacobian_rows_against_vjps": apart / seconds(lambda: cmap.vjp_at_zero(u))}


def growth(model: Any, tokenizer: Any, texts: list[str], cmap: CausalMap, result: dict[str, Any]) -> dict[str, Any]:
    """What the pass in `result` costs by factors, and a quarter of those by prompts and by tokens."""
    rows, (tokens,) = result["factors"], cmap.tokens
    quarter = a_pass(cmap, rows // 4)
    longer = {n: a_map(model, tokenizer, [lengthened(tokenizer, texts[0], n)]) for n in (2 * tokens, 4 * tokens)}
    more = {n: a_map(model, tokenizer, texts[:n]) for n in (2, 4)}
    return {
        "seconds_by_factors": {rows // 4: quarter, rows // 2: a_pass(cmap, rows // 2), rows: result["seconds_a_pass"]},
        "seconds_by_prompts": {1: quarter} | {n: a_pass(of, rows // 4) for n, of in more.items()},
        "seconds_by_tokens": {tokens: quarter} | {n: a_pass(of, rows // 4) for n, of in longer.items()},
    }


def a_fit(cmap: CausalMap, rows: int) -> float:
    """Seconds of ten iterations, with their start and the weights, the second time: the first loads kernels."""
    settings: Any = {"num_factors": rows, "input_scale": 20.0, "iterations": 10, "tolerance": 0, "progress": False}
    return seconds(lambda: fit_exponential(cmap, **settings), 1)


def whole_fit(cmap: CausalMap, rows: int) -> dict[str, Any]:
    """Ten iterations, and the most memory that they and all before them took."""
    on_gpu = cmap.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    took, resident = a_fit(cmap, rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else resident / 2**20
    return {"seconds_of_a_fit_of_ten_iterations": took, "peak_gib": peak}


def scoring(model: Any, tokenizer: Any, texts: list[str], rows: int) -> dict[str, Any]:
    """`rows` vectors scored at once, against a loop of steered passes."""
    vectors = random_vectors(rows, residual_width(model), norm=20.0, seed=0).to(model.device)
    loop = seconds(lambda: looped_scores(model, tokenizer, texts, vectors[:8]), 1) / 8
    ours = seconds(lambda: score_vectors(model, tokenizer, texts, vectors, layer=SOURCE, progress=False), 1) / rows
    return {"scoring_against_steered_passes": loop / ours}


def completing(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Fifty completions of 20 tokens, against transformers' own generate."""
    fifty = (texts * 13)[:50]
    padded = tokenizer(fifty, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    greedy = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    plain = seconds(lambda: model.generate(**padded.to(model.device), **greedy), 1)
    ours = seconds(lambda: generate_completions(model, tokenizer, fifty, max_new_tokens=20, progress=False), 1)
    return {"completing_against_generate": plain / ours}


def peers(model: Any, tokenizer: Any, texts: list[str], result: dict[str, Any]) -> dict[str, Any]:
    """A factor of the passes in `result`, against torch.func on one prompt and on all. Leaves `model` in float32."""
    theta, u = (random_vectors(32, residual_width(model), norm=norm, seed=0).to(model.device) for norm in (20.0, 1.0))
    one, *others = (straightforward(model, tokenizer, text) for text in texts)
    alone, rest = (seconds(lambda peers=peers: [peer(theta, u) for peer in peers]) for peers in ([one], others))
    rows = result["factors"]
    return {
        "speed_against_torch_func_float32": alone / 32 / (result["seconds_a_pass"] / rows),
        "on_four_prompts": (alone + rest) / 32 / (result["seconds_by_prompts"][len(texts)] / (rows // 4)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the work, to see that it runs: nothing is kept"
    )
    quick = parser.parse_args().quick
    silence_transformers()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, texts = model_for(device)
    rows = 32 if quick else (512 if device == "cuda" else 256)
    cmap = a_map(model, tokenizer, texts[:1])
    print(f"{device}, {rows} factors, {cmap.tokens} tokens, {model.dtype}", flush=True)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    result |= passes(model, cmap, rows)
    if device == "cuda":
        result |= compiling(model, tokenizer, texts, rows)
    result |= jacobian(cmap, rows)
    result |= growth(model, tokenizer, texts, cmap, result)
    result |= whole_fit(cmap, rows)
    result |= scoring(model, tokenizer, texts, rows)
    result |= completing(model, tokenizer, texts)
    result |= peers(model, tokenizer, texts, result)
    if not quick:
        folder = Path(__file__).parent / "results"
        write_json(folder / f"{device}.json", result)
        with atomic_path(folder / f"{device}.md") as partial:
            partial.write_text(table(result), encoding="utf-8")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| measure | value |", "|:--|--:|"]
    for name, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{n}: {v:.2f}" for n, v in value.items())
        lines.append(f"| {name.replace('_', ' ')} | {f'{value:.2f}' if isinstance(value, float) else value} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
