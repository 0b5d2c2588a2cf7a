"""Choices behind a fit, varied one at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.fits.baselines import random_vectors
from dctlib.fits.calibration import calibrate
from dctlib.fits.solvers import fit_exponential
from dctlib.maps.causal import CausalMap, Reduction
from dctlib.models.blocks import get_blocks
from dctlib.runs.cache import cached_fit

_REDUCTIONS: dict[str, Reduction] = {"averaged": "mean", "concatenated": "concatenate"}

Choice = tuple[str, Any]
"""The name of a field of :class:`FitConfig`, and its value in a variant."""


@dataclass(frozen=True)
class FitConfig:
    """Choices behind an exponential fit, other than its prompts, its width and its seed.

    Attributes
    ----------
    prompts : {"averaged", "concatenated"}
        Whether Δ is the mean of the changes over prompts, or their concatenation.
    nonlinearity : float
        λ, which sets the scale R.
    horizon : int
        t − s, the number of blocks in the slice.
    positions : int
        Number of last tokens over which the change is averaged.
    """

    prompts: Literal["averaged", "concatenated"]
    nonlinearity: float
    horizon: int
    positions: int


@dataclass(frozen=True, eq=False)
class FitResult:
    """Steering vectors, (m, d), their length R, and the seconds of the fit, 0 for random vectors."""

    vectors: Float[Tensor, "m d"]
    input_scale: float
    seconds: float


def vary_one_choice(reference: FitConfig, values: Mapping[str, Sequence[Any]]) -> dict[Choice, FitConfig]:
    """Return the reference, as ``("reference", …)``, and a variant of it for each other value of each choice.

    Raises
    ------
    ValueError
        If a name in `values` is not a choice.
    """
    unknown = set(values) - set(asdict(reference))
    if unknown:
        raise ValueError(f"got other values of {sorted(unknown)}, expected some of {list(asdict(reference))}")
    description = ", ".join(f"{name} {value}" for name, value in asdict(reference).items())
    variants: dict[Choice, FitConfig] = {("reference", description): reference}
    for name, others in values.items():
        variants |= {(name, value): replace(reference, **{name: value}) for value in others}
    return variants


def fit_each_config(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    variants: Mapping[Choice, FitConfig],
    *,
    source: int,
    num_factors: int,
    iterations: int,
    seed: int,
) -> dict[Choice, FitResult | None]:
    """Fit an exponential transcoder under each config, and store the fits in `folder`.

    Parameters
    ----------
    variants : mapping
        From :func:`vary_one_choice`, the reference first.
    source : int
        s, the layer at which all vectors are added.
    seed : int
        Seed of the calibration, of the fit's start and of the random vectors.

    Returns
    -------
    dict
        The result of each variant, None where no scale R has the non-linearity; and last, as ``("random", …)``, as many
        random vectors of the reference's length.

    Raises
    ------
    ValueError
        If the reference has no scale, or a slice or the positions do not fit the model or the texts.
    """
    deepest = source + max(config.horizon for config in variants.values())
    blocks = len(get_blocks(model))
    if deepest > blocks:
        raise ValueError(f"got a slice that ends at layer {deepest}, expected at most {blocks}, the model's blocks")
    results: dict[Choice, FitResult | None] = {}
    random = None
    for choice, config in variants.items():
        cmap = CausalMap.from_model(
            model,
            tokenizer,
            texts,
            source=source,
            target=source + config.horizon,
            positions=config.positions,
            reduction=_REDUCTIONS[config.prompts],
        )
        try:
            R = calibrate(cmap, nonlinearity=config.nonlinearity, seed=seed)
        except ValueError:
            if random is None:  # the reference
                raise
            results[choice] = None
            continue
        dct = cached_fit(
            folder, fit_exponential, cmap, input_scale=R, num_factors=num_factors, iterations=iterations, seed=seed
        )
        results[choice] = FitResult(dct.steering_vectors(), R, dct.seconds)
        if random is None:
            random = FitResult(random_vectors(num_factors, cmap.d_source, norm=R, seed=seed), R, 0.0)
    return {**results, ("random", f"{num_factors} vectors"): random}
