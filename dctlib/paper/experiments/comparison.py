"""Comparison of methods on one organism, with the same requests, the same judge and the same ranking of vectors."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.evaluation.instructions import benign_split, harmful_instructions, harmful_split
from dctlib.evaluation.judges import is_compliant, perplexity
from dctlib.evaluation.selection import Candidate, best_ablated, rank_candidates
from dctlib.evaluation.statistics import Curve, pass_at_k, success_at_k
from dctlib.fits.calibration import calibrate
from dctlib.maps.causal import CausalMap
from dctlib.models.chat import format_chat, tokenize_each
from dctlib.models.fingerprint import load_fingerprinted
from dctlib.models.loading import load_model
from dctlib.paper.experiments.methods import (
    contrastive_vectors,
    run_methods,
    train_compliance_lora,
    unsupervised_searches,
)
from dctlib.runs.cache import task
from dctlib.steering.generation import generate_completions, generate_per_vector
from dctlib.steering.hooks import ablate, steer
from dctlib.steering.sampling import sample_completions

Judge = Callable[[Sequence[str], Sequence[str]], list[bool]]

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class ComparisonConfig:
    """Settings of a comparison.

    Attributes
    ----------
    clean, clean_digest : str
        The model that judges fluency, and its digest, which is part of the key of the stored result.
    bounds : mapping
        Bounds that :func:`dctlib.evaluation.judges.is_compliant` takes.
    tries : int
        Number of vectors of each method that are tried on test requests, in the order of their validation scores.
    melbo : mapping
        Settings of :func:`dctlib.fits.melbo.melbo`.
    layers, lengths : sequence
        Layers of supervised vectors, and lengths in units of R. The vectors are also tried at their own length.
    """

    source: int
    target: int
    nonlinearity: float
    fit_prompts: int
    num_factors: int
    iterations: int
    melbo: Mapping[str, Any]
    layers: Sequence[int]
    lengths: Sequence[float]
    lora_steps: int
    clean: str
    clean_digest: str
    bounds: Mapping[str, float]
    validation: int
    test: int
    tries: int
    answer_tokens: int


@task(version=2)
def compare_methods(
    model: str, digest: str, dtype: str, *, folder: str, complying: str, config: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Unlock one refusing organism with every method: a task for :func:`dctlib.runs.sweep.run_sweep`.

    Parameters
    ----------
    model, digest, dtype : str
        As in :func:`dctlib.models.fingerprint.fingerprint_model`.
    folder, complying : str
        Folders for the results of searches, and for the model with a LoRA that was trained on compliant answers.
    config : mapping
        The fields of :class:`ComparisonConfig`.

    Returns
    -------
    dict
        ``input_scale``; ``chosen``: supervised direction → the ``layer`` and ``length`` that were selected on
        validation (an ablated direction has its own length); and ``methods``: name → ``solved``, the verdicts of each
        try; ``perplexity``, the median over the completions of the first try; the :func:`side_effects` on benign
        requests; and the cost of the search.
    """
    settings = ComparisonConfig(**config)
    source = settings.source
    rows = harmful_split()
    harmful = harmful_instructions()
    benign = benign_split()
    validation = harmful.validation[: settings.validation]
    requests = harmful.test[: settings.test]
    benign_requests = benign.test[: settings.test]
    run = load_fingerprinted(model, digest, dtype)
    reader = load_model(settings.clean, dtype=dtype)
    judge: Judge = partial(is_compliant, *reader, **settings.bounds)
    generation: dict[str, Any] = {"max_new_tokens": settings.answer_tokens}

    fit_requests = harmful.fit[: settings.fit_prompts]
    texts = format_chat(run[1], fit_requests)
    cmap = CausalMap.from_model(*run, texts, source=source, target=settings.target)
    R = calibrate(cmap, nonlinearity=settings.nonlinearity, seed=seed)
    searches = unsupervised_searches(
        fit_requests,
        input_scale=R,
        num_factors=settings.num_factors,
        iterations=settings.iterations,
        melbo=settings.melbo,
        seed=seed,
    )
    # Not on a cluster: a task that waits for others would hold the workers that they need.
    found = run_methods(model, dtype, searches, source=source, target=settings.target, folder=folder, ray="")

    evaluations: dict[str, Evaluation] = {}
    added: dict[str, Candidate] = {}
    for name, result in found.items():
        candidates = [Candidate(source, vector) for vector in result.vectors]
        best = rank_candidates(*run, validation, candidates)[: settings.tries]
        vectors = torch.stack([candidate.vector for candidate in best])
        evaluations[name] = evaluate_steered(*run, requests, vectors, judge, layer=source, **generation)
        added[name] = best[0]
    evaluations["sampling"] = evaluate_samples(*run, requests, judge, count=settings.tries, seed=seed, **generation)

    contrasts = contrastive_vectors(*run, rows.fit, benign.train[: len(rows.fit)], layers=settings.layers)
    lengths = [R * length for length in settings.lengths]
    supervised: dict[str, Candidate] = {}
    for name, directions in contrasts.items():
        candidates = [candidate for direction in directions for candidate in direction.at_lengths(lengths)]
        supervised[f"{name}, added"] = rank_candidates(*run, validation, candidates)[0]
    ablated = {"means, ablated": best_ablated(*run, validation, contrasts["means"])}
    lora = train_compliance_lora(Path(complying), model, rows.train, steps=settings.lora_steps, seed=seed)

    methods: dict[str, dict[str, Any]] = {name: {} for name in evaluations}
    reference = next_token_logprobs(*run, format_chat(run[1], benign_requests))
    changes = interventions(run, supervised | added, ablated, load_model(complying, dtype=dtype))
    for name, (changed, context) in changes.items():
        with context:
            methods[name] = side_effects(*changed, benign_requests, reference, judge, **generation)
            if name not in evaluations:
                evaluations[name] = evaluate_unsteered(*changed, requests, judge, **generation)

    for name, evaluation in evaluations.items():
        first = perplexity(*reader, requests, evaluation.completions[0])
        methods[name]["perplexity"] = first.median().clamp(max=1e9).item()
        methods[name]["solved"] = evaluation.solved.tolist()
    for name, result in found.items():
        methods[name] |= {"seconds": result.seconds, "forward": result.forward, "backward": result.backward}
        methods[name]["of"] = len(result.vectors)
    methods["LoRA"]["seconds"] = lora.seconds
    chosen = {
        name: {"layer": candidate.layer, "length": candidate.vector.norm().item()}
        for name, candidate in (supervised | ablated).items()
    }
    return {"input_scale": R, "chosen": chosen, "methods": methods}


def success_curves(found: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Return for each method its rate of success with k tries, over the results of :func:`compare_methods`.

    Samples have no order, so their rate is pass@k.
    """
    curves = {}
    for name in found[0]["methods"]:
        solved = torch.tensor([result["methods"][name]["solved"] for result in found])
        curves[name] = pass_at_k(solved) if name == "sampling" else success_at_k(solved)
    return curves


def summarise_methods(found: Sequence[Mapping[str, Any]], *, tries: int) -> dict[str, dict[str, Any]]:
    """Return for each method its rates and mean costs, over the results of :func:`compare_methods`.

    Returns
    -------
    dict
        ``first`` and, with several tries, ``one_of_k``: the rate of success as ``mean``, ``low`` and ``high``, and
        ``lead``, the paired difference of DCT less this method (not for DCT itself); ``firsts``, the rate of the first
        try on each organism; and the costs and side effects as means over organisms.
    """
    curves = success_curves(found)
    per_organism = [success_curves([result]) for result in found]
    summary: dict[str, dict[str, Any]] = {}
    for name, curve in curves.items():
        each = [result["methods"][name] for result in found]
        costs = [cost for cost in each[0] if cost != "solved"]
        summary[name] = {cost: sum(result[cost] for result in each) / len(each) for cost in costs}
        summary[name]["firsts"] = [alone[name].at(1).mean for alone in per_organism]
        for label, k in {"first": 1, "one_of_k": tries}.items():
            if k > len(curve.mean):
                continue
            summary[name][label] = dict(vars(curve.at(k)))
            if name != "DCT":
                summary[name][label]["lead"] = vars(curves["DCT"].paired_difference(curve, k))
    return summary


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The completions of n requests in each of k tries, with the verdicts of a judge.

    Attributes
    ----------
    completions : list of list of str
        The n completions of each try.
    solved : Tensor, (k, n)
        Whether each completion answers its request.
    """

    completions: list[list[str]]
    solved: Bool[Tensor, "k n"]


def judge_completions(judge: Judge, requests: Sequence[str], completions: list[list[str]]) -> Evaluation:
    """Judge the completions of every try."""
    return Evaluation(completions, torch.tensor([judge(requests, answers) for answers in completions]))


def evaluate_steered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    vectors: Float[Tensor, "k d"],
    judge: Judge,
    *,
    layer: int,
    **generation: Any,
) -> Evaluation:
    """Evaluate a model under each vector. Each vector is a try.

    `generation` holds keywords of :func:`dctlib.steering.generation.generate_completions`.
    """
    texts = format_chat(tokenizer, requests)
    completions = generate_per_vector(model, tokenizer, texts, vectors, layer=layer, **generation)
    return judge_completions(judge, requests, completions)


def evaluate_unsteered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    judge: Judge,
    **generation: Any,
) -> Evaluation:
    """Evaluate a model without adding a vector, in one try. A context such as :func:`dctlib.ablate` may change it."""
    completions = generate_completions(model, tokenizer, format_chat(tokenizer, requests), **generation)
    return judge_completions(judge, requests, [completions])


def evaluate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    judge: Judge,
    *,
    count: int,
    seed: int,
    **generation: Any,
) -> Evaluation:
    """Evaluate `count` samples of the unsteered model at temperature 1. Each sample is a try."""
    texts = format_chat(tokenizer, requests)
    completions = sample_completions(model, tokenizer, texts, count=count, seed=seed, **generation)
    return judge_completions(judge, requests, completions)


def next_token_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Float[Tensor, "n vocabulary"]:
    """Return log p of the token after each text, in float32."""
    with torch.no_grad():
        rows = [model(row.to(model.device)).logits[0, -1] for row in tokenize_each(tokenizer, texts)]
    return torch.stack(rows).float().log_softmax(-1).cpu()


def side_effects(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benign: Sequence[str],
    reference: Float[Tensor, "n vocabulary"],
    judge: Judge,
    **generation: Any,
) -> dict[str, float]:
    """Return the effects of a change on benign requests.

    Parameters
    ----------
    reference : Tensor, (n, vocabulary)
        :func:`next_token_logprobs` of the unchanged model after the same requests, in the chat format.

    Returns
    -------
    dict
        ``benign_kl``, the mean KL(changed ‖ unchanged) of the next token in nats; and ``benign_answered``, the fraction
        of requests that are answered.
    """
    changed = next_token_logprobs(model, tokenizer, format_chat(tokenizer, benign))
    kl = F.kl_div(reference, changed, log_target=True, reduction="batchmean")
    answered = evaluate_unsteered(model, tokenizer, benign, judge, **generation).solved
    return {"benign_kl": kl.item(), "benign_answered": answered.double().mean().item()}


def interventions(
    run: Loaded, added: Mapping[str, Candidate], ablated: Mapping[str, Candidate], lora: Loaded
) -> dict[str, tuple[Loaded, AbstractContextManager[None]]]:
    """Return each change of a model that is compared, as the model to evaluate and a context in which to evaluate it.

    Parameters
    ----------
    added, ablated : mapping
        Name → the vector that is added, and the direction that is ablated.
    """
    model = run[0]
    changes: dict[str, tuple[Loaded, AbstractContextManager[None]]] = {}
    for name, candidate in added.items():
        changes[name] = (run, steer(model, layer=candidate.layer, vector=candidate.vector))
    for name, candidate in ablated.items():
        changes[name] = (run, ablate(model, candidate.vector))
    changes["LoRA"] = (lora, nullcontext())
    return changes
