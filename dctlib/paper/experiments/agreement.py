"""Agreement of two fits: of their factors, of their subspaces, and of the tokens that their vectors change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

MERGED_COSINE = 0.3
"""Factors whose mean cosine is at least this are averaged in the merged transcoder."""


@dataclass(frozen=True)
class AgreementConfig:
    """Settings of :func:`fit_agreement`.

    Attributes
    ----------
    fit_prompts : int
        Number of prompts of each fit. One fit takes the first, the other the last of the prompts to fit.
    widths : sequence of int
        Numbers of factors that are compared with ``num_factors``.
    seeds : sequence of int
        The seeds of the two starts.
    probes : int
        Number of directions of each kind (see :func:`dctlib.fits.compare.median_errors`).
    """

    source: int
    target: int
    nonlinearity: float
    iterations: int
    fit_prompts: int
    num_factors: int
    widths: Sequence[int]
    seeds: Sequence[int]
    validation: int
    test: int
    probes: int


def same_change(one: Effects, two: Effects) -> float | None:
    """Return the fraction of changed next tokens that two matched vectors change to the same token.

    Parameters
    ----------
    one, two : Effects
        Effects of k vectors, and of their partners in the same order, on the same n texts. A token counts as changed if
        either vector changes it.

    Returns
    -------
    float or None
        None if no token is changed.

    Raises
    ------
    ValueError
        If the numbers of vectors or of texts differ.
    """
    if one.token.shape != two.token.shape:
        raise ValueError(
            f"got tokens of shapes {tuple(one.token.shape)} and {tuple(two.token.shape)}, expected equal ones"
        )
    changed = (one.token != one.clean) | (two.token != two.clean)
    return (one.token == two.token)[changed].float().mean().item() if changed.any() else None


@task(version=1)
def fit_agreement(model: str, digest: str, dtype: str, *, folder: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fit every setting from two starts on two sets of prompts: a task for :func:`dctlib.runs.sweep.run_sweep`.

    Parameters
    ----------
    model, digest, dtype : str
        As in :func:`dctlib.models.fingerprint.fingerprint_model`.
    folder : str
        Where fits are stored.
    config : mapping
        The fields of :class:`AgreementConfig`.

    Returns
    -------
    dict
        ``input_scale``; ``variants``: how two fits differ → ``cosine`` of matched factors, ``overlap`` of the spans,
        ``behaviour`` (:func:`same_change` of matched vectors on validation texts), and ``scores``, the mean test score
        of the vector of each fit that scores highest on validation; ``errors``: transcoder → kind of direction → median
        relative error; and ``merged``, the number of factors of the merged transcoder. Its errors are measured along
        the factors before the merger.
    """
    settings = AgreementConfig(**config)
    count = settings.num_factors
    organism, tokenizer = load_fingerprinted(model, digest, dtype)
    harmful = harmful_instructions()
    texts = format_chat(tokenizer, harmful.fit)
    validation = format_chat(tokenizer, harmful.validation[: settings.validation])
    test = format_chat(tokenizer, harmful.test[: settings.test])
    maps = [
        CausalMap.from_model(organism, tokenizer, part, source=settings.source, target=settings.target)
        for part in (texts[: settings.fit_prompts], texts[-settings.fit_prompts :])
    ]
    R = calibrate(maps[0], nonlinearity=settings.nonlinearity, seed=settings.seeds[0])

    usual: dict[str, Any] = {"num_factors": count, "iterations": settings.iterations}
    longer = 2 * settings.iterations
    options = {"usual": usual, "soft": usual | {"orthogonalise": "soft"}}
    options[f"{longer} iterations"] = usual | {"iterations": longer}
    for width in settings.widths:
        if width != count:
            options[f"m = {width}"] = usual | {"num_factors": width}
    # A fit is named by its options, its set of prompts (0 or 1) and its start (0 or 1).
    names = [("usual", 0, 1), ("usual", 1, 0), *((name, each, each) for name in options for each in (0, 1))]
    fits = {
        (name, prompts, start): cached_fit(
            folder, fit_exponential, maps[prompts], input_scale=R, seed=settings.seeds[start], **options[name]
        )
        for name, prompts, start in names
    }
    vectors = {fit: dct.steering_vectors() for fit, dct in fits.items()}
    for each, seed in enumerate(settings.seeds):
        vectors["random", each, each] = random_vectors(count, maps[0].d_source, norm=R, seed=seed)
    candidates = {str(fit): rows for fit, rows in vectors.items()}
    selection = select_and_test(
        organism, tokenizer, candidates, validation=validation, test=test, layer=settings.source
    )

    pairs = {
        "other seed": (("usual", 0, 0), ("usual", 0, 1)),
        "other prompts": (("usual", 0, 0), ("usual", 1, 0)),
        **{f"both, {name}": ((name, 0, 0), (name, 1, 1)) for name in options},
        "random": (("random", 0, 0), ("random", 1, 1)),
    }
    variants = {}
    for label, pair in pairs.items():
        V = [vectors[fit] / R for fit in pair]
        matched = [R * rows[numbers] for rows, numbers in zip(V, match_factors(*V), strict=True)]
        changes = [effects(organism, tokenizer, validation, rows, layer=settings.source) for rows in matched]
        scores = [selection.best_by_score[str(fit)].scores for fit in pair]
        variants[label] = {
            "cosine": matched_cosine(*V).mean().item(),
            "overlap": subspace_overlap(*V),
            "behaviour": same_change(*changes),
            "scores": [sum(each) / len(each) for each in scores],
        }

    first = fits["usual", 0, 0]
    transcoders = {f"m = {width}": fits.get((f"m = {width}", 0, 0), first) for width in settings.widths}
    transcoders["merged"] = merge_factors(first, cosine_clusters(first.V, cosine=MERGED_COSINE))
    transcoders["quadratic"] = cached_fit(folder, fit_quadratic, maps[0], **usual, seed=settings.seeds[0])
    transcoders["linear"] = cached_fit(folder, fit_linear, maps[0], num_factors=count)
    errors = {}
    for label, dct in transcoders.items():
        along = first if label == "merged" else None
        errors[label] = median_errors(
            maps[0], dct, input_scale=R, count=settings.probes, seed=settings.seeds[0], along=along
        )
    return {"input_scale": R, "variants": variants, "errors": errors, "merged": len(transcoders["merged"])}
