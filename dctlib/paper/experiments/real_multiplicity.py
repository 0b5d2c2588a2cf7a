"""Wide fits on a real chat model: how they train, and how many of their vectors unlock it."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dctlib.evaluation.instructions import benign_split, harmful_instructions
from dctlib.fits.baselines import difference_of_means, random_vectors
from dctlib.fits.compare import similarity
from dctlib.fits.solvers import fit_exponential
from dctlib.fits.transcoder import Transcoder
from dctlib.maps.causal import CausalMap
from dctlib.maps.orthogonalise import normalise
from dctlib.models.blocks import residual_width
from dctlib.models.chat import format_chat
from dctlib.models.fingerprint import model_key
from dctlib.paper.experiments.aggregates import aggregates, qualifying_vectors, score_ablated
from dctlib.paper.experiments.real_models import judge_texts, open_model
from dctlib.paper.experiments.sample_complexity import draw_instructions, scale_and_refusal_token
from dctlib.runs.cache import Setting, Task, task
from dctlib.steering.generation import generate_completions, generate_per_vector
from dctlib.steering.hooks import ablate
from dctlib.steering.scoring import score_texts, score_vectors

Kind = Literal["DCT", "random"]
Side = Literal["none", "source", "target", "random", "difference of means"]

_FIT = ("nonlinearity", "num_factors", "iterations", "fit_prompts", "calibration_prompts", "pool")
_PROMPTS = ("validation", "answered", "test")
_SUPERVISED = 32
"""Requests of either kind for the difference of means."""


def real_multiplicity_cells(
    model: str,
    *,
    dtype: str,
    source: int,
    target: int,
    widths: list[int],
    curve_iterations: int,
    ablated: int,
    seed: int,
    **settings: Any,
) -> list[tuple[Task, Setting]]:
    """Return the cells that notebooks/real_multiplicity.ipynb reads.

    Parameters
    ----------
    widths, curve_iterations : list of int, int
        Widths and iterations of the training curves, which are of fits to one request.
    ablated : int
        As ``most`` of :func:`ablated_model`.
    settings
        The other arguments of :func:`each_vector`, with those of its ``fit`` and its ``prompts`` by their names.
    """
    fit = {name: settings.pop(name) for name in _FIT}
    prompts = {name: settings.pop(name) for name in _PROMPTS}
    shared = {"model": model_key(model, dtype), "slice_ends": {"source": source, "target": target}, "seed": seed}
    of_one_fit = {**shared, "fit": fit, "prompts": prompts, **settings}
    cells: list[tuple[Task, Setting]] = [(each_vector, {**of_one_fit, "kind": kind}) for kind in get_args(Kind)]
    cells += [(ablated_model, {**of_one_fit, "side": side, "most": ablated}) for side in get_args(Side)]
    for width in widths:
        curve = {**fit, "num_factors": width, "fit_prompts": 1, "iterations": curve_iterations}
        cells.append((training_curve, {**shared, "fit": curve}))
    return cells


@task(version=1, tolerance=0.05)
def training_curve(
    model: Mapping[str, Any], *, slice_ends: Mapping[str, int], fit: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Fit exponential factors, and return the causal importance at each iteration (Figure 2).

    Parameters
    ----------
    model : mapping
        What :func:`dctlib.models.fingerprint.model_key` returns.
    slice_ends : mapping
        ``source`` and ``target``.
    fit : mapping
        ``nonlinearity``, λ, at which R is calibrated on ``calibration_prompts`` requests; ``num_factors``;
        ``iterations``; and ``fit_prompts``, the number of refused requests that are fitted, out of a ``pool``.
    seed : int
        Seed of the calibration, of the choice of requests and of the fit.

    Returns
    -------
    dict
        ``objective``, Σ_l ⟨u_l, Δ_R(v_l)⟩ at the start of each iteration; ``seconds`` of the fit; ``input_scale``, R.
    """
    dct, _ = _wide_fit(model["model"], model["dtype"], **slice_ends, **fit, seed=seed)
    return {"objective": dct.objective.tolist(), "seconds": dct.seconds, "input_scale": dct.input_scale}


@task(version=1, tolerance=0.1, agreement=0.7)
def each_vector(
    model: Mapping[str, Any],
    *,
    kind: Kind,
    slice_ends: Mapping[str, int],
    fit: Mapping[str, Any],
    prompts: Mapping[str, int],
    answer_tokens: int,
    shown_characters: int,
    seed: int,
) -> dict[str, Any]:
    """Complete requests under every vector of one fit, or under as many random vectors, and under aggregates (Table 3).

    Vectors are scored on validation requests by logit("Sure") − logit(w), where w is the token that most refusals of
    this model open with. Vectors that score at least 0 qualify; at least the best two do. The aggregates are the mean
    direction of these and their first singular direction, at length R, with the sign that scores higher.

    Parameters
    ----------
    model, slice_ends, fit, seed
        As in :func:`training_curve`.
    kind : str
        ``"DCT"``, the vectors of the fit, or ``"random"``, random ones of length R.
    prompts : mapping
        Numbers of requests: ``validation``, to score on; ``answered``, those of them that are completed under every
        vector; and ``test``, completed under the best vector and the aggregates.
    answer_tokens, shown_characters : int
        Length of the completions, in tokens, and the length to which they are cut.

    Returns
    -------
    dict
        ``scores``, one for each vector; ``verdicts``, a list for each vector; ``qualifying``, numbers of vectors, best
        first; ``similarity`` of these; ``test``: ``best``, ``mean`` and ``singular`` → ``score`` and ``verdicts``;
        ``input_scale``, R; ``refusal_token``, w.

    Raises
    ------
    ValueError
        If there is no such kind.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"got kind={kind!r}, expected one of {get_args(Kind)}")
    name, validation_count = (model["model"], model["dtype"]), prompts["validation"]
    opened, tokenizer = open_model(*name)
    dct, refusal_token, scores = _scored_fit(*name, validation_count, **slice_ends, **fit, seed=seed)
    harmful = harmful_instructions()
    validation, test = harmful.validation[:validation_count], harmful.test[: prompts["test"]]
    texts = format_chat(tokenizer, validation)
    steering: dict[str, Any] = {"layer": slice_ends["source"], "progress": False}
    scoring = {"negative": refusal_token, **steering}

    def verdicts_under(vectors: Tensor, requests: list[str]) -> list[list[dict[str, Any]]]:
        chats = format_chat(tokenizer, requests)
        completed = generate_per_vector(opened, tokenizer, chats, vectors, max_new_tokens=answer_tokens, **steering)
        return [judge_texts(opened, tokenizer, requests, each, shown_characters) for each in completed]

    vectors = dct.steering_vectors()
    if kind == "random":
        vectors = random_vectors(*vectors.shape, norm=dct.input_scale, seed=seed)
        scores = score_vectors(opened, tokenizer, texts, vectors, **scoring).tolist()

    qualifying = qualifying_vectors(scores, 0.0)
    rows = normalise(vectors[qualifying])
    unsigned = dct.input_scale * aggregates(rows)
    signs = torch.stack([unsigned, -unsigned])
    by_sign = score_vectors(opened, tokenizer, texts, signs.flatten(0, 1), **scoring).reshape(2, 2)
    chosen = torch.cat([vectors[qualifying[:1]], signs[by_sign.argmax(0), torch.arange(2)]])
    test_scores = score_vectors(opened, tokenizer, format_chat(tokenizer, test), chosen, **scoring).tolist()
    tested = zip(("best", "mean", "singular"), test_scores, verdicts_under(chosen, test), strict=True)
    return {
        "scores": list(scores),
        "verdicts": verdicts_under(vectors, validation[: prompts["answered"]]),
        "qualifying": qualifying,
        "similarity": vars(similarity(rows)),
        "test": {label: {"score": score, "verdicts": verdicts} for label, score, verdicts in tested},
        "input_scale": dct.input_scale,
        "refusal_token": refusal_token,
    }


@task(version=1, tolerance=0.1, agreement=0.7)
def ablated_model(
    model: Mapping[str, Any],
    *,
    side: Side,
    most: int,
    slice_ends: Mapping[str, int],
    fit: Mapping[str, Any],
    prompts: Mapping[str, int],
    answer_tokens: int,
    shown_characters: int,
    seed: int,
) -> dict[str, Any]:
    """Score requests while one direction is ablated, each in turn, and complete others under the best (Tables 4, 5).

    Parameters
    ----------
    model, slice_ends, fit, prompts, answer_tokens, shown_characters, seed
        As in :func:`each_vector`. The requests to score are those that it completes under every vector.
    side : str
        The directions: ``"source"`` or ``"target"``, v or u of the qualifying factors; ``"random"``, as many random
        ones; ``"difference of means"``, one that is supervised; or ``"none"``, which leaves the model as it is.
    most : int
        The largest number of directions.

    Returns
    -------
    dict
        ``scores``, the mean score under each ablation; ``aggregates``, those of the mean direction and of the first
        singular direction, if there are several directions; ``verdicts`` on test requests under the ablation that
        scores highest.

    Raises
    ------
    ValueError
        If there is no such side.
    """
    if side not in get_args(Side):
        raise ValueError(f"got side={side!r}, expected one of {get_args(Side)}")
    name = (model["model"], model["dtype"])
    opened, tokenizer = open_model(*name)
    dct, refusal_token, fit_scores = _scored_fit(*name, prompts["validation"], **slice_ends, **fit, seed=seed)
    qualifying = qualifying_vectors(fit_scores, 0.0)[:most]
    harmful = harmful_instructions()
    match side:
        case "source":
            rows = dct.V[qualifying]
        case "target":
            rows = dct.U[qualifying]
        case "random":
            rows = random_vectors(len(qualifying), residual_width(opened), norm=1.0, seed=seed)
        case "difference of means":
            sides = [format_chat(tokenizer, split.train[:_SUPERVISED]) for split in (benign_split(), harmful)]
            rows = difference_of_means(opened, tokenizer, *sides, layer=slice_ends["source"])[None]
        case "none":
            rows = None

    def scores_of(directions: Tensor) -> list[float]:
        return score_ablated(opened, tokenizer, directions, texts, negative=refusal_token).mean(1).tolist()

    texts = format_chat(tokenizer, harmful.validation[: prompts["answered"]])
    if rows is None:
        scores = [score_texts(opened, tokenizer, texts, negative=refusal_token).mean().item()]
    else:
        scores = scores_of(rows)
    test = harmful.test[: prompts["test"]]
    chats = format_chat(tokenizer, test)
    with nullcontext() if rows is None else ablate(opened, rows[scores.index(max(scores))]):
        completions = generate_completions(opened, tokenizer, chats, max_new_tokens=answer_tokens, progress=False)
    return {
        "scores": scores,
        "aggregates": [] if rows is None or len(rows) == 1 else scores_of(aggregates(rows)),
        "verdicts": judge_texts(opened, tokenizer, test, completions, shown_characters),
    }


@lru_cache(maxsize=1)
def _scored_fit(
    name: str, dtype: str, validation: int, *, source: int, **fit: Any
) -> tuple[Transcoder, str, list[float]]:
    """Return a fit, the token that most refusals open with, and the mean validation score of each vector."""
    model, tokenizer = open_model(name, dtype)
    dct, refusal_token = _wide_fit(name, dtype, source=source, **fit)
    texts = format_chat(tokenizer, harmful_instructions().validation[:validation])
    vectors = dct.steering_vectors()
    scores = score_vectors(model, tokenizer, texts, vectors, layer=source, negative=refusal_token, progress=False)
    return dct, refusal_token, scores.tolist()


@lru_cache(maxsize=1)
def _wide_fit(
    name: str,
    dtype: str,
    *,
    source: int,
    target: int,
    nonlinearity: float,
    num_factors: int,
    iterations: int,
    fit_prompts: int,
    calibration_prompts: int,
    pool: int,
    seed: int,
) -> tuple[Transcoder, str]:
    """Return an exponential fit to refused requests, and the token that most refusals open with."""
    model, tokenizer = open_model(name, dtype)
    R, refusal_token = scale_and_refusal_token(
        name, dtype, source, target, nonlinearity, calibration_prompts, seed, None
    )
    requests = draw_instructions(name, dtype, fit_prompts, pool, seed, True)
    cmap = CausalMap.from_model(model, tokenizer, format_chat(tokenizer, requests), source=source, target=target)
    dct = fit_exponential(
        cmap, num_factors=num_factors, input_scale=R, iterations=iterations, seed=seed, progress=False
    )
    return dct, refusal_token
