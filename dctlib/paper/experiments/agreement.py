"""Whether two fits found the same: factor by factor, as subspaces, and in what their vectors make a model say."""

from typing import Any

from dctlib.evaluation.instructions import harmful_instructions
from dctlib.evaluation.selection import select_and_test
from dctlib.fits.baselines import random_vectors
from dctlib.fits.calibration import calibrate
from dctlib.fits.compare import (
    cosine_clusters,
    match_factors,
    matched_cosine,
    median_errors,
    merge_factors,
    subspace_overlap,
)
from dctlib.fits.solvers import fit_exponential, fit_linear, fit_quadratic
from dctlib.maps.causal import CausalMap
from dctlib.models.chat import format_chat
from dctlib.models.fingerprint import load_fingerprinted
from dctlib.runs.cache import cached_fit, task
from dctlib.steering.effects import Effects, effects


def same_change(one: Effects, two: Effects) -> float | None:
    """Of the next tokens that a vector or its partner changes: the fraction that both change, to the same token.

    Parameters
    ----------
    one, two : Effects
        Of k vectors, and of their partners in the same order, on the same n texts.

    Returns
    -------
    float or None
        None if none changes any.

    Raises
    ------
    ValueError
        If they are not of as many vectors and texts.
    """
    if one.token.shape != two.token.shape:
        raise ValueError(
            f"got tokens of shapes {tuple(one.token.shape)} and {tuple(two.token.shape)}, expected equal ones"
        )
    changed = (one.token != one.clean) | (two.token != two.clean)
    return (one.token == two.token)[changed].float().mean().item() if changed.any() else None


MERGED_COSINE = 0.3


@task(version=1)
def fit_agreement(
    model: str,
    digest: str,
    dtype: str,
    *,
    folder: str,
    source: int,
    target: int,
    nonlinearity: float,
    iterations: int,
    fit_prompts: int,
    num_factors: int,
    widths: list[int],
    seeds: list[int],
    validation: int,
    test: int,
    probes: int,
) -> dict[str, Any]:
    """Fit every setting from two starts on two sets of prompts, and hold the first fits to their map.

    A task for :func:`dctlib.runs.sweep.run_sweep`.

    Parameters
    ----------
    model, digest, dtype : str
        See :func:`dctlib.models.fingerprint.fingerprint_model`.
    folder : str
        Where fits are remembered.
    fit_prompts : int
        The first and the last so many of the prompts to fit, each set for one of the two fits.
    widths : list of int
        Other numbers of factors.
    seeds : list of int
        Two: of the two starts.
    probes : int
        Directions of each kind, see :func:`dctlib.fits.compare.median_errors`.

    Returns
    -------
    dict
        ``input_scale``; ``variants``: what the two fits differ in → ``cosine`` of matched factors, ``overlap`` of the
        spans, ``behaviour`` of matched vectors on validation (:func:`dctlib.paper.experiments.agreement.same_change`: None where no
        vector changes a token), and ``scores`` on test of the two vectors that score highest on validation;
        ``errors``: transcoder → kind → median relative error; ``merged``: the factors that are left of `num_factors`
        where those are averaged whose mean cosine is at least ``MERGED_COSINE``. The merged transcoder is probed along
        the factors that it was made from.
    """
    organism, tokenizer = load_fingerprinted(model, digest, dtype)
    harmful, at = harmful_instructions(), dict[str, Any](source=source, target=target)
    texts = format_chat(tokenizer, harmful.fit)
    asked, tested = (format_chat(tokenizer, of) for of in (harmful.validation[:validation], harmful.test[:test]))
    maps = [CausalMap.from_model(organism, tokenizer, of, **at) for of in (texts[:fit_prompts], texts[-fit_prompts:])]
    R = calibrate(maps[0], nonlinearity=nonlinearity, seed=seeds[0])

    usual: dict[str, Any] = {"num_factors": num_factors, "iterations": iterations}
    settings = {"usual": usual, "soft": usual | {"orthogonalise": "soft"}}
    settings |= {f"{2 * iterations} iterations": usual | {"iterations": 2 * iterations}}
    settings |= {f"m = {m}": usual | {"num_factors": m} for m in widths if m != num_factors}
    wanted = {"other seed": ("usual", 0, 1), "other prompts": ("usual", 1, 0)}
    wanted |= {f"{name} {which}": (name, which, which) for name in settings for which in (0, 1)}
    fits = {
        label: cached_fit(folder, fit_exponential, maps[prompts], input_scale=R, seed=seeds[start], **settings[name])
        for label, (name, prompts, start) in wanted.items()
    }

    candidates = {label: dct.steering_vectors() for label, dct in fits.items()}
    candidates |= {f"random {i}": random_vectors(num_factors, maps[0].d_source, norm=R, seed=seeds[i]) for i in (0, 1)}
    trial = select_and_test(organism, tokenizer, candidates, validation=asked, test=tested, layer=source)
    pairs = {name: ("usual 0", name) for name in ("other seed", "other prompts")}
    pairs |= {f"both, {name}": (f"{name} 0", f"{name} 1") for name in settings} | {"random": ("random 0", "random 1")}
    variants = {}
    for name, pair in pairs.items():
        V = [candidates[label] / R for label in pair]
        partners = [R * v[numbers] for v, numbers in zip(V, match_factors(*V), strict=True)]
        does = [effects(organism, tokenizer, asked, of, layer=source) for of in partners]
        best = [trial.best_by_score[label].scores for label in pair]
        variants[name] = {
            "cosine": matched_cosine(*V).mean().item(),
            "overlap": subspace_overlap(*V),
            "behaviour": same_change(*does),
            "scores": [sum(scores) / len(scores) for scores in best],
        }

    first = fits["usual 0"]
    held = {f"m = {m}": fits.get(f"m = {m} 0", first) for m in widths}
    held["merged"] = merge_factors(first, cosine_clusters(first.V, cosine=MERGED_COSINE))
    held["quadratic"] = cached_fit(folder, fit_quadratic, maps[0], **usual, seed=seeds[0])
    held["linear"] = cached_fit(folder, fit_linear, maps[0], num_factors=num_factors)
    probed: dict[str, Any] = {"input_scale": R, "count": probes, "seed": seeds[0]}
    along = {"merged": first}
    errors = {name: median_errors(maps[0], dct, **probed, along=along.get(name)) for name, dct in held.items()}
    return {"input_scale": R, "variants": variants, "errors": errors, "merged": len(held["merged"])}
