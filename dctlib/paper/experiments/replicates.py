"""Replicates: the post's experiments on organisms that were trained from other seeds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dctlib.evaluation.instructions import benign_split, harmful_instructions
from dctlib.evaluation.judges import fraction_true, is_refusal, opens_with
from dctlib.evaluation.selection import select_and_test
from dctlib.fits.baselines import random_vectors
from dctlib.fits.calibration import calibrate
from dctlib.fits.solvers import fit_exponential
from dctlib.maps.causal import CausalMap
from dctlib.models.chat import format_chat
from dctlib.models.fingerprint import load_fingerprinted
from dctlib.paper.experiments.aggregates import ablate_each, add_each, qualifying_vectors
from dctlib.paper.organisms.training import check_organism
from dctlib.runs.cache import task
from dctlib.steering.generation import generate_completions


@dataclass(frozen=True)
class ReplicateConfig:
    """Settings of :func:`replicate_on_organism`.

    Attributes
    ----------
    least : float
        The least share of refusals of harmful test instructions, and of helpful answers to benign ones.
    threshold : float
        The validation score of a qualifying vector.
    ablated : int
        Number of test instructions that are scored under each ablation.
    """

    least: float
    source: int
    target: int
    nonlinearity: float
    iterations: int
    fit_prompts: int
    num_factors: int
    validation: int
    threshold: float
    test: int
    ablated: int


@task(version=2)
def replicate_on_organism(
    model: str, digest: str, dtype: str, *, config: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Repeat three notebooks on one refusing organism: a task for :func:`dctlib.runs.sweep.run_sweep`.

    Parameters
    ----------
    model, digest, dtype : str
        As in :func:`dctlib.models.fingerprint.fingerprint_model`.
    config : mapping
        The fields of :class:`ReplicateConfig`.

    Returns
    -------
    dict
        The rates ``refuses`` and ``helps``; and ``training_curves``, ``multiplicity`` and ``ablation``, the results of
        these notebooks, as :func:`dctlib.paper.claims.compare_with_published` reads them.

    Raises
    ------
    ValueError
        If the organism falls short of ``least``.
    """
    settings = ReplicateConfig(**config)
    harmful = harmful_instructions()
    organism, tokenizer = load_fingerprinted(model, digest, dtype)
    test = format_chat(tokenizer, harmful.test[: settings.test])
    benign = format_chat(tokenizer, benign_split().test[: settings.test])
    refusals = generate_completions(organism, tokenizer, test, max_new_tokens=16)
    answers = generate_completions(organism, tokenizer, benign, max_new_tokens=16)
    rates = {
        "refuses": fraction_true([is_refusal(answer) for answer in refusals]),
        "helps": fraction_true([opens_with(answer, "Sure") and not is_refusal(answer) for answer in answers]),
    }
    check_organism(f"refusal-{seed}", rates, least=settings.least)

    count, layer = settings.num_factors, settings.source
    texts = format_chat(tokenizer, harmful.fit[: settings.fit_prompts])
    cmap = CausalMap.from_model(organism, tokenizer, texts, source=layer, target=settings.target)
    R = calibrate(cmap, nonlinearity=settings.nonlinearity, seed=seed)
    dct = fit_exponential(cmap, num_factors=count, input_scale=R, iterations=settings.iterations, seed=seed)
    candidates = {
        "random": random_vectors(count, cmap.d_source, norm=R, seed=seed),
        "DCT": dct.steering_vectors(),
    }
    validation = format_chat(tokenizer, harmful.validation[: settings.validation])
    selection = select_and_test(organism, tokenizer, candidates, validation=validation, test=test, layer=layer)
    means = {label: sum(best.scores) / len(best.scores) for label, best in selection.best.items()}

    scores = selection.validation["DCT"].logit_diff.mean(1).tolist()
    qualifying = qualifying_vectors(scores, settings.threshold)
    added = add_each(organism, tokenizer, dct.V[qualifying], layer=layer, norm=R, validation=validation, test=test)
    ablated = {}
    for side, rows in {"source": dct.V, "target": dct.U}.items():
        found = ablate_each(
            organism,
            tokenizer,
            rows[qualifying],
            test=test[: settings.ablated],
            description=f"ablating {side} directions",
        )
        ablated[side] = vars(found)
    return {
        **rates,
        "training_curves": {
            "clean": sum(selection.clean.scores) / len(selection.clean.scores),
            "random_best": means["random"],
            "dct_best": means["DCT"],
            "sure_rate": {"DCT": selection.best["DCT"].top1_rate},
            "width": {str(count): {"objective": dct.objective.tolist()}},
        },
        "multiplicity": {
            "of": count,
            "threshold": settings.threshold,
            "count": sum(score >= settings.threshold for score in scores),
            "count_at_least_5": sum(score >= 5 for score in scores),
            **vars(added),
        },
        "ablation": ablated,
    }
