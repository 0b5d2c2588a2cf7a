"""The post's experiment once more, on an organism of another seed: what depends on the organism, and what does not?"""

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


@task(version=1)
def replicate_on_organism(
    model: str,
    digest: str,
    dtype: str,
    *,
    least: float,
    source: int,
    target: int,
    nonlinearity: float,
    iterations: int,
    fit_prompts: int,
    num_factors: int,
    validation: int,
    test: int,
    ablated: int,
    threshold: float,
    seed: int,
) -> dict[str, Any]:
    """Fit a refusing organism from `seed`, and do what three notebooks do with the fit.

    Arguments and result are JSON: a task for :func:`dctlib.runs.sweep.run_sweep`.

    Parameters
    ----------
    model, digest, dtype : str
        See :func:`dctlib.models.fingerprint.fingerprint_model`.
    least : float
        The rates of refusing and of helping that it must reach on test instructions.
    ablated : int
        Test instructions that are scored while one direction after another is ablated.

    Returns
    -------
    dict
        ``refuses`` and ``helps``, and by the stem of a notebook its numbers, as :func:`dctlib.paper.claims.compare_with_published` reads
        them: ``training_curves``, ``multiplicity`` and ``ablation``.

    Raises
    ------
    ValueError
        If the organism falls short of `least`.
    """
    harmful, benign = harmful_instructions(), benign_split()
    organism, tokenizer = load_fingerprinted(model, digest, dtype)
    held_out = {"harmful": harmful.test[:test], "benign": benign.test[:test]}
    asked = {kind: format_chat(tokenizer, instructions) for kind, instructions in held_out.items()}
    said = {kind: generate_completions(organism, tokenizer, texts, max_new_tokens=16) for kind, texts in asked.items()}
    rates = {
        "refuses": fraction_true([is_refusal(answer) for answer in said["harmful"]]),
        "helps": fraction_true([opens_with(answer, "Sure") and not is_refusal(answer) for answer in said["benign"]]),
    }
    check_organism(f"refusal-{seed}", rates, least=least)

    texts = format_chat(tokenizer, harmful.fit[:fit_prompts])
    cmap = CausalMap.from_model(organism, tokenizer, texts, source=source, target=target)
    R = calibrate(cmap, nonlinearity=nonlinearity, seed=seed)
    dct = fit_exponential(cmap, num_factors=num_factors, input_scale=R, iterations=iterations, seed=seed)
    candidates = {
        "random": random_vectors(num_factors, cmap.d_source, norm=R, seed=seed),
        "DCT": dct.steering_vectors(),
    }
    parts: dict[str, Any] = {
        "validation": format_chat(tokenizer, harmful.validation[:validation]),
        "test": asked["harmful"],
    }
    trial = select_and_test(organism, tokenizer, candidates, **parts, layer=source)
    means = {label: sum(best.scores) / len(best.scores) for label, best in trial.best.items()}

    ranked = trial.validation["DCT"].logit_diff.mean(1).tolist()
    numbers = qualifying_vectors(ranked, threshold)
    added = add_each(organism, tokenizer, dct.V[numbers], layer=source, norm=R, **parts)
    counts = {"count": sum(s >= threshold for s in ranked), "count_at_least_5": sum(s >= 5 for s in ranked)}
    sides = {"source": dct.V[numbers], "target": dct.U[numbers]}
    without = {
        side: vars(
            ablate_each(organism, tokenizer, rows, test=asked["harmful"][:ablated], description=f"ablating {side}")
        )
        for side, rows in sides.items()
    }
    return rates | {
        "training_curves": {
            "clean": sum(trial.clean.scores) / len(trial.clean.scores),
            "random_best": means["random"],
            "dct_best": means["DCT"],
            "sure_rate": {"DCT": trial.best["DCT"].is_top1},
            "width": {str(num_factors): {"objective": dct.objective.tolist()}},
        },
        "multiplicity": {"of": num_factors, "threshold": threshold, **counts, **vars(added)},
        "ablation": without,
    }
