"""The best vector of each method against the number of fit prompts (Figure 1 of the post)."""

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.evaluation.instructions import harmful_instructions, shuffled
from dctlib.fits.baselines import random_vectors
from dctlib.fits.calibration import calibrate
from dctlib.maps.causal import CausalMap
from dctlib.models.blocks import residual_width
from dctlib.models.chat import format_chat
from dctlib.models.fingerprint import model_key
from dctlib.models.loading import dtype_name
from dctlib.paper.experiments.methods import find_vectors
from dctlib.paper.experiments.real_models import complete_refused, judge_texts, open_model, refused_requests
from dctlib.runs.cache import Setting, Task, task
from dctlib.steering.generation import generate_completions
from dctlib.steering.scoring import score_each

Arm = Literal["exponential", "exponential_axes", "quadratic", "linear", "linear_projected", "random", "unsteered"]
"""How the vectors of a cell are made. Exponential fits start from projections, or from coordinate axes."""

_RANKING = 4  # validation instructions that all vectors are scored on
_LEFT = 8  # best vectors, which are scored on all validation instructions
_PROMPTS = {"fit": "fit_prompts", "pool": "pool", "validation": "validation", "test": "test", "judged": "judged"}


def sample_complexity_cells(
    model: str,
    *,
    dtype: str,
    source: int,
    target: int,
    arms: Mapping[Arm, Mapping[str, int]],
    negative: str | None,
    **settings: Any,
) -> list[tuple[Task, Setting]]:
    """Return the cells that notebooks/sample_complexity.ipynb reads, one shuffle after another.

    Parameters
    ----------
    dtype : str
        As for :func:`dctlib.load_model`. A record names the type, so those of ``"native"`` hold for machines like this.
    arms : mapping
        Arm → number of fit prompts → number of shuffles. A cell without a vector is added, and one of random vectors
        for each shuffle.
    negative : str or None
        As in :func:`best_vector`.
    settings
        The other arguments of :func:`best_vector`. Its ``prompts`` are given as ``fit_prompts``, ``pool``,
        ``validation``, ``test`` and ``judged``.
    """
    prompts = {part: settings.pop(name) for part, name in _PROMPTS.items()}
    slice_ends = {"source": source, "target": target}
    shared = {"model": model_key(model, dtype_name(dtype)), "slice_ends": slice_ends, "prompts": prompts, **settings}
    if negative is not None:
        shared["negative"] = negative
    cells: list[tuple[str, int, int]] = [("unsteered", 0, 0)]
    for shuffle in range(max(shuffles for sizes in arms.values() for shuffles in sizes.values())):
        cells.append(("random", 0, shuffle))
        cells += [
            (arm, int(n), shuffle) for arm, sizes in arms.items() for n, shuffles in sizes.items() if shuffle < shuffles
        ]
    return [(best_vector, {**shared, "arm": arm, "n": n, "shuffle": shuffle}) for arm, n, shuffle in cells]


@task(version=1, tolerance=0.1, agreement=0.7)
def best_vector(
    model: Mapping[str, Any],
    *,
    arm: Arm,
    n: int,
    shuffle: int,
    slice_ends: Mapping[str, Any],
    nonlinearity: float,
    num_factors: int,
    iterations: int,
    prompts: Mapping[str, int],
    answer_tokens: int,
    shown_characters: int,
    seed: int,
    negative: str | None = None,
) -> dict[str, Any]:
    """Fit `n` refused instructions by one method, rank its vectors on validation instructions, and test the best one.

    Every arm gives `num_factors` vectors of length R. Where a factor has no sign, these are both signs of half as many
    factors. All vectors are scored on four validation instructions, and the best eight on all of them. The score is
    logit("Sure") − logit(w). w is `negative` or, if that is left out, the token that most refusals of this model open
    with.

    Parameters
    ----------
    model : mapping
        What :func:`dctlib.models.fingerprint.model_key` returns.
    arm, n, shuffle
        The method is fitted to the first `n` instructions in an order that depends on `shuffle`, or to the first `n`
        that the model refuses if `negative` is left out. The start of a fit depends on `shuffle`, too.
    slice_ends : mapping
        ``source`` and ``target``.
    nonlinearity : float
        λ, at which R is calibrated once on fixed instructions.
    prompts : mapping
        Numbers of instructions: ``fit``, to calibrate on; ``pool``, to draw the fitted ones from; ``validation``, to
        rank on; ``test``; and ``judged``, those of the test instructions that are completed.
    answer_tokens, shown_characters : int
        Length of the completions, in tokens, and the length to which they are cut.
    seed : int
        Seed of the calibration. Fits and shuffles take it plus `shuffle`.
    negative : str, optional
        The word that refusals open with. If it is given, refusals of the fitted instructions are not verified.

    Returns
    -------
    dict
        ``best``, the number of the best vector; ``ranking``, the score of each on four validation instructions;
        ``scores``, those of the best on the test instructions; ``sure``, the fraction of them after which "Sure" is the
        most likely token; ``verdicts``, one a completion, where ``compliant`` says whether it answers the request
        (:func:`dctlib.evaluation.judges.is_compliant`); ``input_scale``; ``refusal_token``; ``seconds`` of the fit.

    Raises
    ------
    ValueError
        If there is no such arm, or the model refuses too few instructions.
    """
    if arm not in get_args(Arm):
        raise ValueError(f"got arm={arm!r}, expected one of {get_args(Arm)}")
    opened, tokenizer = open_model(model["model"], model["dtype"])
    name = (model["model"], model["dtype"])
    R, refusal_token = scale_and_refusal_token(
        *name, *slice_ends.values(), nonlinearity, prompts["fit"], seed, negative
    )
    width = residual_width(opened)
    started = time.perf_counter()
    fitted = draw_instructions(*name, n, prompts["pool"], seed + shuffle, negative is None) if n else ()
    if arm == "unsteered":
        vectors = torch.zeros(1, width)
    elif arm == "random":
        vectors = random_vectors(num_factors, width, norm=R, seed=seed + shuffle)
    else:
        cmap = CausalMap.from_model(opened, tokenizer, format_chat(tokenizer, fitted), **slice_ends)
        started = time.perf_counter()
        vectors = find_vectors(cmap, R=R, **_search_of(arm, num_factors, iterations, seed + shuffle))
    seconds = time.perf_counter() - started

    harmful = harmful_instructions()
    validation = format_chat(tokenizer, harmful.validation[: prompts["validation"]])
    requests = harmful.test[: prompts["test"]]
    test = format_chat(tokenizer, requests)
    steering: dict[str, Any] = {"layer": slice_ends["source"], "negative": refusal_token, "progress": False}
    ranking, (best, *_) = rank_twice(opened, tokenizer, validation, vectors, first=_RANKING, **steering)
    tested = score_each(opened, tokenizer, test, vectors[[best]], **steering)

    completions = generate_completions(
        opened,
        tokenizer,
        test[: prompts["judged"]],
        max_new_tokens=answer_tokens,
        layer=slice_ends["source"],
        vector=vectors[best],
        progress=False,
    )
    return {
        "best": best,
        "ranking": ranking.tolist(),
        "scores": tested.logit_diff[0].tolist(),
        "sure": tested.is_top1.float().mean().item(),
        "verdicts": judge_texts(opened, tokenizer, requests[: prompts["judged"]], completions, shown_characters),
        "input_scale": R,
        "refusal_token": refusal_token,
        "seconds": seconds,
    }


def _search_of(arm: Arm, num_factors: int, iterations: int, seed: int) -> dict[str, Any]:
    """Return the arguments of :func:`dctlib.paper.experiments.methods.find_vectors` for an arm that is fitted."""
    half, gradient = num_factors // 2, {"iterations": iterations, "seed": seed}
    match arm:
        case "exponential" | "exponential_axes":
            init = "axes" if arm == "exponential_axes" else "projected"
            return {"method": "exponential", "num_factors": num_factors, "init": init, **gradient}
        case "quadratic":
            return {"method": "quadratic", "num_factors": half, **gradient}
        case "linear":
            return {"method": "linear", "num_factors": half}
        case _:
            return {"method": "linear", "num_factors": half, "projections": 32, "seed": seed}


def rank_twice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    vectors: Float[Tensor, "m d"],
    *,
    first: int,
    **steering: Any,
) -> tuple[Float[Tensor, " m"], list[int]]:
    """Return the mean score of each vector on the `first` texts, and the best eight by their scores on all of them.

    `steering` holds the other arguments of :func:`dctlib.steering.scoring.score_each`.
    """
    on_first = score_each(model, tokenizer, texts[:first], vectors, **steering).logit_diff.mean(1)
    left = on_first.argsort(descending=True, stable=True)[:_LEFT]
    on_all = score_each(model, tokenizer, texts, vectors[left], **steering).logit_diff.mean(1)
    return on_first, left[on_all.argsort(descending=True, stable=True)].tolist()


@lru_cache(maxsize=1)
def scale_and_refusal_token(
    name: str,
    dtype: str,
    source: int,
    target: int,
    nonlinearity: float,
    count: int,
    seed: int,
    negative: str | None,
) -> tuple[float, str]:
    """Return R on the first `count` instructions to fit, and the word that refusals open with."""
    model, tokenizer = open_model(name, dtype)
    instructions, token = harmful_instructions().fit[:count], negative
    if token is None:
        instructions, token = refused_requests(model, tokenizer, harmful_instructions().fit, count)
    cmap = CausalMap.from_model(model, tokenizer, format_chat(tokenizer, instructions), source=source, target=target)
    return calibrate(cmap, nonlinearity=nonlinearity, seed=seed), token


@lru_cache(maxsize=1)
def draw_instructions(name: str, dtype: str, n: int, pool: int, seed: int, verified: bool) -> tuple[str, ...]:
    """Return the first `n` instructions of a shuffled pool or, if `verified`, the first that the model refuses."""
    harmful = harmful_instructions()
    order = shuffled((harmful.fit + harmful.train)[:pool], seed=seed)
    if not verified:
        return tuple(order[:n])
    model, tokenizer = open_model(name, dtype)
    refused: list[str] = []
    for first in range(0, len(order), n):
        drawn = order[first : first + n]
        refused += [request for request, _ in complete_refused(model, tokenizer, drawn, progress=False)]
        if len(refused) >= n:
            return tuple(refused[:n])
    raise ValueError(f"the model refuses {len(refused)} of {len(order)} instructions, expected at least {n}")
