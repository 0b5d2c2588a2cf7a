"""Compare methods that make candidates for a search, and a refinement by gradients, on a model that refuses.

    python benchmarks/sources.py qwen2.5-coder-0.5b-instruct --source 8 --target 16
    python benchmarks/sources.py models/laptop/refusal --source 10 --target 20 --judge smollm2-135m-instruct

Every method gives the same number of directions, each at about the length whose damage is the bound of
`dctlib.search_vectors`. All are read on validation requests, without a judge. The three best of each method are tested
on other requests: the share that is answered, by `dctlib.evaluation.judges.is_compliant`. Then the three best of the
exponential fit, and three random ones, are refined by gradient steps: away from the model's own answers to the fit
requests. The random ones are the control. Rows are added to benchmarks/results/sources.json.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib import CausalMap, calibrate, fit_linear, format_chat, load_model, steer
from dctlib._io import ROOT, write_json
from dctlib.discovery.criteria import Criteria
from dctlib.discovery.damage import measure_damage, unsteered_answers
from dctlib.discovery.lengths import estimate_lengths
from dctlib.discovery.reading import Reader
from dctlib.evaluation.instructions import benign_split, harmful_instructions
from dctlib.evaluation.judges import fraction_true, is_compliant
from dctlib.maps.orthogonalise import normalise, orthonormal_rows
from dctlib.models.likelihood import Example, answer_loss
from dctlib.paper.experiments.methods import find_vectors
from dctlib.paper.experiments.real_models import BOUNDS
from dctlib.steering.generation import generate_per_vector

_RESULTS = ROOT / "benchmarks" / "results" / "sources.json"
_MAX_DAMAGE, _TESTED = 0.5, 3
_STEPS, _ANGLE = 8, 0.15  # of the refinement, in radians


def main() -> None:
    """Compare the methods on the model of the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--source", type=int, required=True)
    parser.add_argument("--target", type=int, required=True)
    parser.add_argument("--judge", help="the model that judges answers, if it is another one")
    parser.add_argument("--count", type=int, default=24, help="directions of each method, an even number")
    parser.add_argument("--seed", type=int, default=0, help="of the fits, and of which requests are fitted and read")
    given = parser.parse_args()
    model, tokenizer = load_model(given.model, dtype="native")
    judge = load_model(given.judge, dtype="native") if given.judge else (model, tokenizer)
    answers = partial(is_compliant, *judge, **BOUNDS)
    requests, benign = harmful_instructions(), benign_split().test
    fit = requests.fit[4 * given.seed :][:4]
    read, tested = requests.validation[6 * given.seed :][:6], requests.test[:24]

    maps = [
        CausalMap.from_model(model, tokenizer, format_chat(tokenizer, texts), source=given.source, target=given.target)
        for texts in (fit, benign[24:36])
    ]
    R = calibrate(maps[0], num_directions=8, seed=given.seed)
    begun = time.perf_counter()
    directions, seconds = {}, {}
    for name, make in METHODS.items():
        directions[name] = normalise(make(*maps, given.count, R, given.seed).cpu().float())
        seconds[name] = round(time.perf_counter() - begun)
        begun = time.perf_counter()

    examples = unsteered_answers(model, tokenizer, benign[:24:2])
    measure = partial(measure_damage, model, tokenizer, examples[:8], layer=given.source)
    reader = Reader(model, tokenizer, given.source, Criteria.from_answers(model, tokenizer, examples), None)

    def at_bound(rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        return torch.tensor(estimate_lengths(measure, R * rows, _MAX_DAMAGE))[:, None] * R * rows

    def evaluate(vectors: Float[Tensor, "k d"]) -> tuple[list[int], dict[str, Any]]:
        scores = reader.read(read, vectors, max_new_tokens=16).scores()
        best = sorted(range(len(scores)), key=lambda row: -scores[row])[:_TESTED]
        texts = format_chat(tokenizer, tested)
        steering: dict[str, Any] = {"layer": given.source, "max_new_tokens": 24, "progress": False}
        completed = generate_per_vector(model, tokenizer, texts, vectors[best], **steering)
        return best, {
            "scores": [round(scores[row], 3) for row in best],
            "above_0.3": sum(score > 0.3 for score in scores),
            "answered": [round(fraction_true(answers(tested, completions)), 3) for completions in completed],
            "lengths": [round((vectors[row].norm() / R).item(), 2) for row in best],
        }

    group = {name: getattr(given, name) for name in ("model", "source", "target", "count", "seed")}
    rows, finalists = [], {}
    for name, unit in directions.items():
        vectors = at_bound(unit)
        best, found = evaluate(vectors)
        finalists[name] = vectors[best]
        rows.append({**group, "method": name, **found, "seconds": seconds[name]})
        print(rows[-1], flush=True)
    own = unsteered_answers(model, tokenizer, fit, max_new_tokens=12)
    for name in ("exponential", "random"):
        begun = time.perf_counter()
        refined = normalise(
            torch.stack([refine(model, tokenizer, own, each, given.source) for each in finalists[name]])
        )
        spent = round(time.perf_counter() - begun)
        rows.append({**group, "method": f"{name}, refined", **evaluate(at_bound(refined))[1], "seconds": spent})
        print(rows[-1], flush=True)
    earlier = json.loads(_RESULTS.read_text(encoding="utf-8")) if _RESULTS.exists() else []
    others = [row for row in earlier if any(row[name] != value for name, value in group.items())]
    write_json(_RESULTS, others + rows)


def homotopy(fitted: CausalMap, _benign: CausalMap, count: int, R: float, seed: int) -> Float[Tensor, "m d"]:
    """Return V of an exponential fit whose scale grows from R/4 to R, two iterations each."""
    V = fit_linear(fitted, count, projections=2 * count, seed=seed, progress=False).V
    U = normalise(fitted.jvp(torch.zeros_like(V), V))
    for scale in (0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0):
        V = orthonormal_rows(V)
        values, gradients = fitted.value_and_vjp(scale * R * V, U)
        U, V = normalise(values), normalise(gradients)
    return V


def contrast(fitted: CausalMap, benign: CausalMap, count: int, _R: float, seed: int) -> Float[Tensor, "m d"]:
    """Return directions v, in both signs, with the largest ‖W T1 v‖² on the fit requests over that on harmless ones.

    They are generalised eigenvectors of (AᵀA, BᵀB + tr(BᵀB)/d · I), with A and B the projected Jacobians W·T1 of both.
    """
    W = torch.randn(2 * count, fitted.d_target, generator=torch.Generator().manual_seed(seed))
    A, B = (
        torch.cat([cmap.vjp_at_zero(rows) for rows in W.to(cmap.dtype).split(cmap.chunk_size)]).double()
        for cmap in (fitted, benign)
    )
    second = B.T @ B
    second += second.trace() / len(second) * torch.eye(len(second), dtype=second.dtype)
    inverse = torch.linalg.inv(torch.linalg.cholesky(second))
    _, vectors = torch.linalg.eigh(inverse @ (A.T @ A) @ inverse.T)  # ascending
    leading = (inverse.T @ vectors).T.flip(0)[: count // 2]
    return torch.cat([leading, -leading])


METHODS = {
    "exponential": lambda fitted, _benign, count, R, seed: find_vectors(
        fitted, "exponential", R, num_factors=count, iterations=8, seed=seed
    ),
    "homotopy": homotopy,
    "contrast": contrast,
    "power steering": lambda fitted, _benign, count, R, seed: find_vectors(
        fitted, "power steering", R, num_vectors=count // 2, seed=seed
    ),
    "projected linear": lambda fitted, _benign, count, R, seed: find_vectors(
        fitted, "linear", R, num_factors=count // 2, projections=32, seed=seed
    ),
    "random": lambda fitted, _benign, count, R, seed: find_vectors(fitted, "random", R, num_vectors=count, seed=seed),
}


def refine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    vector: Float[Tensor, " d"],
    layer: int,
) -> Float[Tensor, " d"]:
    """Return the vector after a few steps on its sphere that raise the loss of the model's own answers."""
    length = vector.norm()
    for _ in range(_STEPS):
        vector = vector.detach().requires_grad_()
        with torch.enable_grad(), steer(model, layer=layer, vector=vector):
            (gradient,) = torch.autograd.grad(answer_loss(model, tokenizer, examples), vector)
        unit = vector.detach() / length
        tangent = gradient - (gradient @ unit) * unit
        vector = length * normalise((unit + _ANGLE * tangent / tangent.norm())[None])[0]
    return vector.detach()


if __name__ == "__main__":
    main()
