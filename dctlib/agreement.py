"""Agreement: every setting fitted twice on one organism, how alike the two fits are, and how faithful each is."""

from typing import Any

from dctlib.baselines import random_vectors
from dctlib.causal_map import CausalMap
from dctlib.effects import clusters, effects
from dctlib.faithfulness import median_errors, merged
from dctlib.fit import fit_exponential, fit_linear, fit_quadratic, remembered
from dctlib.input_scale import calibrate
from dctlib.pinned_model import open_pinned
from dctlib.prompts import format_chat, harmful_instructions
from dctlib.rank import choose_and_test
from dctlib.stability import matched, matched_cosine, same_change, subspace_overlap

MERGED_COSINE = 0.3


def agreement(
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

    A task for :func:`dctlib.sweep.map_fits`.

    Parameters
    ----------
    model, digest, dtype : str
        See :func:`dctlib.pinned_model.pin`.
    folder : str
        Where fits are remembered.
    fit_prompts : int
        The first and the last so many of the prompts to fit, each set for one of the two fits.
    widths : list of int
        Other numbers of factors.
    seeds : list of int
        Two: of the two starts.
    probes : int
        Directions of each kind, see :func:`dctlib.faithfulness.median_errors`.

    Returns
    -------
    dict
        ``input_scale``; ``variants``: what the two fits differ in → ``cosine`` of matched factors, ``overlap`` of the
        spans, ``behaviour`` of matched vectors on validation (:func:`dctlib.stability.same_change`: None where no
        vector changes a token), and ``scores`` on test of the two vectors that score highest on validation;
        ``errors``: transcoder → kind → median relative error; ``merged``: the factors that are left of `num_factors`
        where those are averaged whose mean cosine is at least ``MERGED_COSINE``. The merged transcoder is probed along
        the factors that it was made from.
    """
    organism, tokenizer = open_pinned(model, digest, dtype)
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
        label: remembered(folder, fit_exponential, maps[prompts], input_scale=R, seed=seeds[start], **settings[name])
        for label, (name, prompts, start) in wanted.items()
    }

    candidates = {label: dct.steering_vectors() for label, dct in fits.items()}
    candidates |= {f"random {i}": random_vectors(num_factors, maps[0].d_source, norm=R, seed=seeds[i]) for i in (0, 1)}
    trial = choose_and_test(organism, tokenizer, candidates, validation=asked, test=tested, layer=source)
    pairs = {name: ("usual 0", name) for name in ("other seed", "other prompts")}
    pairs |= {f"both, {name}": (f"{name} 0", f"{name} 1") for name in settings} | {"random": ("random 0", "random 1")}
    variants = {}
    for name, pair in pairs.items():
        V = [candidates[label] / R for label in pair]
        partners = [R * v[numbers] for v, numbers in zip(V, matched(*V), strict=True)]
        does = [effects(organism, tokenizer, asked, of, layer=source) for of in partners]
        best = [trial.test[f"{label}, score alone"] for label in pair]
        variants[name] = {
            "cosine": matched_cosine(*V).mean().item(),
            "overlap": subspace_overlap(*V),
            "behaviour": same_change(*does),
            "scores": [sum(scores) / len(scores) for scores in best],
        }

    first = fits["usual 0"]
    held = {f"m = {m}": fits.get(f"m = {m} 0", first) for m in widths}
    held["merged"] = merged(first, clusters(first.V, cosine=MERGED_COSINE))
    held["quadratic"] = remembered(folder, fit_quadratic, maps[0], **usual, seed=seeds[0])
    held["linear"] = remembered(folder, fit_linear, maps[0], num_factors=num_factors)
    probed: dict[str, Any] = {"input_scale": R, "count": probes, "seed": seeds[0]}
    along = {"merged": first}
    errors = {name: median_errors(maps[0], dct, **probed, along=along.get(name)) for name, dct in held.items()}
    return {"input_scale": R, "variants": variants, "errors": errors, "merged": len(held["merged"])}
