"""Methods side by side: the same organism, requests and judge, and what each finds ranked on the same validation."""

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
from dctlib.paper.experiments.methods import MethodResult, run_methods
from dctlib.paper.experiments.supervised import contrastive_vectors, train_compliance_lora
from dctlib.runs.cache import task
from dctlib.steering.generation import generate_completions, generate_per_vector, sample_completions
from dctlib.steering.hooks import ablate, steer

Judge = Callable[[Sequence[str], Sequence[str]], list[bool]]

Run = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@task(version=1)
def compare_methods(
    model: str,
    digest: str,
    dtype: str,
    *,
    folder: str,
    complying: str,
    clean: str,
    clean_digest: str,
    bounds: dict[str, float],
    source: int,
    target: int,
    nonlinearity: float,
    fit_prompts: int,
    validation: int,
    test: int,
    tries: int,
    answer_tokens: int,
    search: dict[str, Any],
    layers: list[int],
    lengths: list[float],
    lora_steps: int,
    seed: int,
) -> dict[str, Any]:
    """Let all methods unlock one refusing organism, with one judge, on the same requests.

    A task for :func:`dctlib.runs.sweep.run_sweep`.

    Parameters
    ----------
    model, digest, dtype : str
        See :func:`dctlib.models.fingerprint.fingerprint_model`.
    folder : str
        Where searches are kept.
    complying : str
        Where the LoRA lies that is shown compliant answers, or will.
    clean, clean_digest : str
        The model that judges what is fluent, and its digest, which is part of a task's key.
    bounds : dict
        What :func:`dctlib.evaluation.judges.is_compliant` takes.
    tries : int
        Vectors of each method that are tried, best first on `validation` requests.
    search : dict
        What :func:`run_unsupervised_methods` takes of methods.
    layers, lengths : list
        Where supervised vectors are taken, and the lengths in units of R that they are tried at beside their own.

    Returns
    -------
    dict
        ``input_scale``; ``chosen``, of what is supervised the ``layer`` and the ``length`` that won on validation (a
        direction that is ablated has its own); and
        ``methods``: name → ``solved``, a row of verdicts a try; ``perplexity``, the median of what the first try says;
        where it changes the model what :func:`side_effects` says; and of a search what it takes (see :class:`MethodResult`).
    """
    rows, harmful, benign = harmful_split(), harmful_instructions(), benign_split()
    run, reader = load_fingerprinted(model, digest, dtype), load_model(clean, dtype=dtype)
    judge: Judge = partial(is_compliant, *reader, **bounds)
    fitted, on, asked = harmful.fit[:fit_prompts], harmful.validation[:validation], harmful.test[:test]
    kind, known = benign.test[:test], contrastive_vectors(*run, rows.fit, benign.train[: len(rows.fit)], layers=layers)
    cmap = CausalMap.from_model(*run, format_chat(run[1], fitted), source=source, target=target)
    R = calibrate(cmap, nonlinearity=nonlinearity, seed=seed)
    where: dict[str, Any] = {"source": source, "target": target, "folder": Path(folder)}
    found = run_unsupervised_methods(model, dtype, fitted, input_scale=R, **search, seed=seed, **where)
    answers: dict[str, Any] = {"max_new_tokens": answer_tokens}

    best = {}
    tried = {}
    for method, result in found.items():
        best[method] = rank_candidates(*run, on, [Candidate(source, vector) for vector in result.vectors])[:tries]
        vectors = torch.stack([candidate.vector for candidate in best[method]])
        tried[method] = evaluate_steered(*run, asked, vectors, judge, layer=source, **answers)
    tried["sampling"] = evaluate_samples(*run, asked, judge, count=tries, seed=seed, **answers)

    norms = [R * length for length in lengths]
    added = {}
    for name, directions in known.items():
        lengthened = [candidate for direction in directions for candidate in direction.at_lengths(norms)]
        added[f"{name}, added"] = rank_candidates(*run, on, lengthened)[0]
    ablated = {"means, ablated": best_ablated(*run, on, known["means"])}
    lora = train_compliance_lora(Path(complying), model, rows.train, steps=lora_steps, seed=seed)
    added |= {method: of[0] for method, of in best.items()}
    results, usual = {name: {} for name in tried}, next_token_logprobs(*run, format_chat(run[1], kind))
    for name, (who, how) in interventions(run, added, ablated, load_model(complying, dtype=dtype)).items():
        with how:
            results[name] = side_effects(*who, kind, usual, judge, **answers)
            tried[name] = tried.get(name) or evaluate_unsteered(*who, asked, judge, **answers)

    for name, of in tried.items():
        ppl = perplexity(*reader, asked, of.said[0]).median().clamp(max=1e9).item()
        results[name] |= {"perplexity": ppl, "solved": of.solved.tolist()}
    for name, e in found.items():
        results[name] |= {"seconds": e.seconds, "forward": e.forward, "backward": e.backward, "of": len(e.vectors)}
    results["LoRA"] |= {"seconds": lora.seconds}
    supervised = {name: of for name, of in (added | ablated).items() if name not in best}
    chosen = {name: {"layer": of.layer, "length": of.vector.norm().item()} for name, of in supervised.items()}
    return {"input_scale": R, "chosen": chosen, "methods": results}


def success_curves(found: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Of :func:`compare_methods` on several organisms: method → how often one of k tries succeeds; samples have no order."""
    tried = {name: torch.tensor([of["methods"][name]["solved"] for of in found]) for name in found[0]["methods"]}
    return {name: (pass_at_k if name == "sampling" else success_at_k)(of) for name, of in tried.items()}


def summarise_methods(found: Sequence[Mapping[str, Any]], *, tries: int) -> dict[str, dict[str, Any]]:
    """Of :func:`compare_methods` on several organisms: method → its rates, and the means of what else is known of it.

    Returns
    -------
    dict
        ``first`` and, of what has several tries, ``one_of_k``: ``mean``, ``low`` and ``high``, and except for DCT
        ``lead``, DCT's over it (see :meth:`dctlib.evaluation.statistics.Curve.paired_difference`); ``firsts``, the first try's rate on each
        organism; and means over organisms.
    """
    curves, alone, results = success_curves(found), [success_curves([of]) for of in found], {}
    for name, curve in curves.items():
        each = [of["methods"][name] for of in found]
        costs = [cost for cost in each[0] if cost != "solved"]
        results[name] = {cost: sum(of[cost] for of in each) / len(each) for cost in costs}
        results[name]["firsts"] = [of[name].at(1).mean for of in alone]
        for label, k in {"first": 1, "one_of_k": tries}.items():
            if k <= len(curve.mean):
                lead = {"lead": vars(curves["DCT"].paired_difference(curve, k))} if name != "DCT" else {}
                results[name][label] = vars(curve.at(k)) | lead
    return results


def run_unsupervised_methods(
    model: str,
    dtype: str,
    instructions: list[str],
    *,
    input_scale: float,
    num_factors: int,
    iterations: int,
    melbo_vectors: int,
    melbo_steps: int,
    melbo_learning_rate: float,
    seed: int,
    source: int,
    target: int,
    folder: Path,
) -> dict[str, MethodResult]:
    """What methods that know nothing but the map find: `num_factors` vectors of length R each, fewer by MELBO.

    MELBO finds one vector after another, so its vectors cost most; power steering leaves the sign open and gives both.
    """
    melbo = {"num_vectors": melbo_vectors, "steps": melbo_steps, "learning_rate": melbo_learning_rate}
    methods = {
        "DCT": {"method": "exponential", "num_factors": num_factors, "iterations": iterations},
        "MELBO": {"method": "MELBO", **melbo},
        "power steering": {"method": "power steering", "num_vectors": num_factors // 2},
        "random": {"method": "random", "num_vectors": num_factors},
    }
    same = {"instructions": instructions, "input_scale": input_scale, "seed": seed}
    searches = {name: {**same, **of} for name, of in methods.items()}
    # Not on a cluster: a task of one that waits for others holds what they need.
    return run_methods(model, dtype, searches, source=source, target=target, folder=folder, ray="")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What k tries made a model say to n requests, and whether each answers its request.

    Attributes
    ----------
    said : list of list of str
        n completions a try.
    solved : Tensor, (k, n)
        The judge's verdicts.
    """

    said: list[list[str]]
    solved: Bool[Tensor, "k n"]


def judge_completions(judge: Judge, requests: Sequence[str], said: list[list[str]]) -> Evaluation:
    """Tries at the requests, with the judge's verdict of each completion."""
    return Evaluation(said, torch.tensor([judge(requests, completions) for completions in said]))


def evaluate_steered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    vectors: Float[Tensor, "k d"],
    judge: Judge,
    *,
    layer: int,
    max_new_tokens: int,
    progress: bool = True,
) -> Evaluation:
    """What the model says under each vector, one try a vector."""
    texts, options = format_chat(tokenizer, requests), {"max_new_tokens": max_new_tokens, "progress": progress}
    return judge_completions(
        judge, requests, generate_per_vector(model, tokenizer, texts, vectors, layer=layer, **options)
    )


def evaluate_unsteered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    judge: Judge,
    *,
    max_new_tokens: int,
    progress: bool = True,
) -> Evaluation:
    """What the model says as it is, or as a context such as :func:`dctlib.ablate` makes it: one try."""
    texts, options = format_chat(tokenizer, requests), {"max_new_tokens": max_new_tokens, "progress": progress}
    return judge_completions(judge, requests, [generate_completions(model, tokenizer, texts, **options)])


def evaluate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    judge: Judge,
    *,
    count: int,
    max_new_tokens: int,
    seed: int,
    progress: bool = True,
) -> Evaluation:
    """`count` samples of the unsteered model at temperature 1, one try a sample."""
    texts, options = format_chat(tokenizer, requests), {"max_new_tokens": max_new_tokens, "progress": progress}
    return judge_completions(
        judge, requests, sample_completions(model, tokenizer, texts, count=count, seed=seed, **options)
    )


def next_token_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Float[Tensor, "n vocabulary"]:
    """log p of the token after each text, in float32."""
    with torch.no_grad():
        rows = [model(row.to(model.device)).logits[0, -1] for row in tokenize_each(tokenizer, texts)]
    return torch.stack(rows).float().log_softmax(-1).cpu()


def side_effects(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benign: Sequence[str],
    usual: Float[Tensor, "n vocabulary"],
    judge: Judge,
    *,
    max_new_tokens: int,
    progress: bool = True,
) -> dict[str, float]:
    """What a change does to benign requests: KL(changed ‖ usual) of the next token in nats, and the share answered.

    Parameters
    ----------
    usual : Tensor, (n, vocabulary)
        :func:`next_token_logprobs` of the same requests, in the chat format, without the change.
    """
    after = next_token_logprobs(model, tokenizer, format_chat(tokenizer, benign))
    answered = evaluate_unsteered(
        model, tokenizer, benign, judge, max_new_tokens=max_new_tokens, progress=progress
    ).solved
    kl = F.kl_div(usual, after, log_target=True, reduction="batchmean")
    return {"benign_kl": kl.item(), "benign_answered": answered.double().mean().item()}


def interventions(
    run: Run, added: Mapping[str, Candidate], ablated: Mapping[str, Candidate], lora: Run
) -> dict[str, tuple[Run, AbstractContextManager[None]]]:
    """Every change of a model that is compared, as the model to ask and the context to ask it in, to be entered once.

    Parameters
    ----------
    added, ablated : mapping
        Name → what the model is steered with, and the direction that it does without.
    """
    model, changed = run[0], dict[str, tuple[Run, AbstractContextManager[None]]]()
    changed |= {name: (run, steer(model, layer=of.layer, vector=of.vector)) for name, of in added.items()}
    changed |= {name: (run, ablate(model, of.vector)) for name, of in ablated.items()}
    return changed | {"LoRA": (lora, nullcontext())}
