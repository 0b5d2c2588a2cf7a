"""Methods that find steering vectors, compared within one bound on damage on a real chat model."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.discovery.damage import measure_damage, unsteered_answers
from dctlib.discovery.search import search_vectors
from dctlib.evaluation.instructions import benign_split, harmful_instructions, shuffled
from dctlib.evaluation.judges import fraction_true, is_compliant
from dctlib.evaluation.statistics import Interval, wilson
from dctlib.fits.baselines import difference_of_means
from dctlib.maps.causal import CausalMap
from dctlib.maps.orthogonalise import normalise
from dctlib.models.blocks import residual_width
from dctlib.models.chat import format_chat
from dctlib.models.fingerprint import model_key
from dctlib.paper.experiments.methods import find_vectors
from dctlib.paper.experiments.real_models import BOUNDS, judge_texts, open_model
from dctlib.paper.experiments.sample_complexity import draw_instructions, rank_twice, scale_and_refusal_token
from dctlib.runs.cache import Setting, Task, task
from dctlib.steering.generation import generate_completions, generate_per_vector

Method = Literal[
    "DCT", "projected linear", "power steering", "MELBO", "random", "difference of means", "search", "unsteered"
]

_LEFT = 4  # best vectors, which are tried at several lengths
# In minutes like 64 factors of DCT on four requests. The steps are fewer and longer than in the publication.
_MELBO = {"num_vectors": 4, "steps": 60, "learning_rate": 0.05}
_PROMPTS = {name: name for name in ("pool", "validation", "test", "benign", "supervised")} | {"fit": "fit_prompts"}


def real_baselines_cells(
    model: str,
    *,
    dtype: str,
    source: int,
    target: int,
    methods: Mapping[Method, int],
    **settings: Any,
) -> list[tuple[Task, Setting]]:
    """Return the cells that notebooks/real_baselines.ipynb reads, one shuffle after another.

    Parameters
    ----------
    methods : mapping
        Method → its number of shuffles.
    settings
        The other arguments of :func:`at_equal_damage`. Its ``prompts`` are given as ``fit_prompts``, ``pool``,
        ``validation``, ``test``, ``benign`` and ``supervised``.
    """
    prompts = {part: settings.pop(name) for part, name in _PROMPTS.items()}
    fits = {name: settings.pop(name) for name in ("nonlinearity", "num_factors", "iterations")}
    slice_ends = {"source": source, "target": target}
    shared = {"model": model_key(model, dtype), "slice_ends": slice_ends, "prompts": prompts, "fits": fits, **settings}
    cells: list[tuple[str, int]] = [("unsteered", 0)]
    for shuffle in range(max(methods.values())):
        cells += [(method, shuffle) for method, shuffles in methods.items() if shuffle < shuffles]
    return [(at_equal_damage, {**shared, "method": method, "shuffle": shuffle}) for method, shuffle in cells]


@task(version=1, tolerance=0.1, agreement=0.7)
def at_equal_damage(
    model: Mapping[str, Any],
    *,
    method: Method,
    shuffle: int,
    slice_ends: Mapping[str, Any],
    fits: Mapping[str, Any],
    prompts: Mapping[str, int],
    multiples: Sequence[float],
    max_damage: float,
    tokens: Mapping[str, int],
    seed: int,
) -> dict[str, Any]:
    """Find vectors by one method, choose one and its length under a bound on damage, and test it.

    All vectors are ranked by logit("Sure") − logit(w) on validation requests, where w is the token that most refusals
    open with. Validation requests are completed under the best four at several lengths. The vector and the length with
    the most answers within the bound on damage are chosen, and among equals those with the least damage. Damage is the
    mean KL(steered ‖ unsteered) of the next token over the unsteered answers to harmless requests. One half of the
    requests serves for the bound, the other half for the damage that is reported.

    Parameters
    ----------
    model : mapping
        What :func:`dctlib.models.fingerprint.model_key` returns.
    method : str
        ``"search"`` is :func:`dctlib.search_vectors` without a judge, which chooses a vector and its length itself.
        ``"MELBO"`` finds four vectors, whatever the width of the fits.
    shuffle : int
        Draws the fit requests and starts the fits.
    slice_ends : mapping
        ``source`` and ``target``.
    fits : mapping
        ``nonlinearity``, λ; ``num_factors``, the number of vectors of each method; ``iterations``.
    prompts : mapping
        Numbers of requests: ``fit``, to fit; ``pool``, to draw them from; ``validation``, to choose on; ``test``;
        ``benign``, harmless ones; ``supervised``, of either kind for the difference of means.
    multiples : sequence of float
        Lengths in units of R.
    max_damage : float
        The bound on damage, in nats a token.
    tokens : mapping
        ``validation`` and ``test``: length of the completions; ``shown``: the number of characters that are kept.
    seed : int
        Seed of the calibration. Fits and shuffles take it plus `shuffle`.

    Returns
    -------
    dict
        ``grid``: ``number``, ``multiple``, ``answered`` and ``damage`` of each vector and length that was tried;
        ``found``, whether there is a vector; ``chosen``, the row of the chosen one, 0 if the grid is empty;
        ``verdicts`` on the test completions; ``damage`` of the chosen vector on the other harmless
        requests; ``length``, in units of R; ``seconds`` until the vectors were found; ``input_scale``.

    Raises
    ------
    ValueError
        If there is no such method.
    """
    if method not in get_args(Method):
        raise ValueError(f"got method={method!r}, expected one of {get_args(Method)}")
    name, source = (model["model"], model["dtype"]), slice_ends["source"]
    opened, tokenizer = open_model(*name)
    R, refusal_token = scale_and_refusal_token(
        *name, *slice_ends.values(), fits["nonlinearity"], prompts["fit"], seed, None
    )
    drawn = draw_instructions(*name, prompts["fit"], prompts["pool"], seed + shuffle, True)
    harmful = harmful_instructions()
    validation = harmful.validation[: prompts["validation"]]
    benign = benign_split().test[: prompts["benign"]]
    started = time.perf_counter()
    vectors = _vectors(
        opened, tokenizer, method, R, drawn, slice_ends=slice_ends, fits=fits, prompts=prompts, seed=seed + shuffle
    )
    seconds = time.perf_counter() - started

    tried: list[tuple[int, float]] = [(0, 1.0)] * len(vectors)  # the vector of the search at its own length, or none
    grid: list[dict[str, Any]] = []
    if method not in ("search", "unsteered"):
        texts = format_chat(tokenizer, validation)
        steering: dict[str, Any] = {"layer": source, "negative": refusal_token, "progress": False}
        _, best = rank_twice(opened, tokenizer, texts, vectors, first=len(texts) // 2, **steering)
        tried = [(number, multiple) for number in best[:_LEFT] for multiple in multiples]
        vectors = torch.stack([multiple * vectors[number] for number, multiple in tried])
        completed = generate_per_vector(
            opened, tokenizer, texts, vectors, layer=source, max_new_tokens=tokens["validation"], progress=False
        )
        bounded_on = unsteered_answers(opened, tokenizer, benign[::2])
        damages = measure_damage(opened, tokenizer, bounded_on, vectors, layer=source).tolist()
        for (number, multiple), completions, damage in zip(tried, completed, damages, strict=True):
            answered = fraction_true(is_compliant(opened, tokenizer, validation, completions, **BOUNDS))
            grid.append({"number": number, "multiple": multiple, "answered": answered, "damage": damage})
    chosen = choose_within(grid, max_damage) if grid else 0
    vector = vectors[chosen] if len(vectors) else torch.zeros(residual_width(opened))

    requests = harmful.test[: prompts["test"]]
    texts = format_chat(tokenizer, requests)
    completions = generate_completions(
        opened, tokenizer, texts, max_new_tokens=tokens["test"], layer=source, vector=vector, progress=False
    )
    reported_on = unsteered_answers(opened, tokenizer, benign[1::2])
    return {
        "grid": grid,
        "found": len(vectors) > 0,
        "chosen": chosen,
        "verdicts": judge_texts(opened, tokenizer, requests, completions, tokens["shown"]),
        "damage": measure_damage(opened, tokenizer, reported_on, vector[None], layer=source).item(),
        "length": vector.norm().item() / R,
        "seconds": seconds,
        "input_scale": R,
    }


def summarise_methods(
    settings: Sequence[Setting], results: Sequence[Mapping[str, Any]], *, test: int
) -> dict[str, dict[str, Any]]:
    """Return what each method reached, averaged over its shuffles.

    Parameters
    ----------
    settings, results
        Of cells of :func:`at_equal_damage`. The result of an edited model has no length.
    test : int
        The number of test requests, over which the intervals are.

    Returns
    -------
    dict
        Method → ``success``, an :class:`Interval` as a dict, by Wilson; ``each``, that of every shuffle; ``refused``;
        ``benign_kl``, the damage; ``length`` in units of R, or None; ``minutes`` until the vectors were found; and
        ``found``, the share of shuffles with a vector.
    """
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for setting, result in zip(settings, results, strict=True):
        methods.setdefault(setting["method"], []).append(result)

    def mean(shuffles: Sequence[Mapping[str, Any]], name: str) -> float:
        return sum(float(result[name]) for result in shuffles) / len(shuffles)

    def verdicts(result: Mapping[str, Any], name: str) -> float:
        return fraction_true([verdict[name] for verdict in result["verdicts"]])

    summary = {}
    for method, shuffles in methods.items():
        answered = [verdicts(result, "compliant") for result in shuffles]
        rate = sum(answered) / len(answered)
        summary[method] = {
            "success": asdict(Interval(rate, *wilson(rate, test))),
            "each": answered,
            "refused": sum(verdicts(result, "refused") for result in shuffles) / len(shuffles),
            "benign_kl": mean(shuffles, "damage"),
            "length": None if shuffles[0]["length"] is None else mean(shuffles, "length"),
            "minutes": mean(shuffles, "seconds") / 60,
            "found": mean(shuffles, "found"),
        }
    return summary


def _vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    R: float,
    requests: Sequence[str],
    *,
    slice_ends: Mapping[str, Any],
    fits: Mapping[str, Any],
    prompts: Mapping[str, int],
    seed: int,
) -> Float[Tensor, "m d"]:
    """Return the vectors of a method at length R. The vector of the search has the length that the search chose."""
    count = fits["num_factors"]
    cmap = CausalMap.from_model(model, tokenizer, format_chat(tokenizer, requests), **slice_ends)
    find = partial(find_vectors, cmap, R=R, seed=seed)
    match method:
        case "DCT":
            return find(method="exponential", num_factors=count, iterations=fits["iterations"])
        case "projected linear":
            return find(method="linear", num_factors=count // 2, projections=32)
        case "power steering":
            return find(method="power steering", num_vectors=count // 2)
        case "MELBO":
            return find(method="MELBO", **_MELBO)
        case "random":
            return find(method="random", num_vectors=count)
        case "difference of means":
            towards = shuffled(benign_split().train, seed=seed)[: prompts["supervised"]]
            away = shuffled(harmful_instructions().train, seed=seed)[: prompts["supervised"]]
            sides = [format_chat(tokenizer, instructions) for instructions in (towards, away)]
            return R * normalise(difference_of_means(model, tokenizer, *sides, layer=slice_ends["source"])[None])
        case "search":
            validation = harmful_instructions().validation
            found = search_vectors(
                model, tokenizer, fit=requests, validation=validation, **slice_ends, seed=seed, progress=False
            )
            return found.vectors[:1]
        case _:
            return torch.zeros(0, cmap.d_source)


def choose_within(grid: Sequence[Mapping[str, Any]], max_damage: float) -> int:
    """Return the row with the most answers within the bound on damage; if none is within it, that of least damage."""
    within = [row for row, each in enumerate(grid) if each["damage"] <= max_damage]
    if not within:
        return min(range(len(grid)), key=lambda row: grid[row]["damage"])
    return min(within, key=lambda row: (-grid[row]["answered"], grid[row]["damage"]))
