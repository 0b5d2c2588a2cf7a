"""The choices behind a fit, changed one at a time."""

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

Change = tuple[str, Any]
"""What was changed, and to what."""


@dataclass(frozen=True)
class FitConfig:
    """What an exponential fit rests on besides its prompts, its width and its seed.

    Attributes
    ----------
    prompts : {"averaged", "concatenated"}
        Whether Δ is the mean of the prompts' changes or all of them side by side.
    nonlinearity : float
        λ, which sets the scale R.
    horizon : int
        t − s, the number of blocks of the slice.
    positions : int
        Last tokens over which the change is averaged.
    """

    prompts: Literal["averaged", "concatenated"]
    nonlinearity: float
    horizon: int
    positions: int


@dataclass(frozen=True, eq=False)
class Found:
    """Steering vectors, (m, d), their length and what the fit took, in seconds; 0 for random vectors."""

    vectors: Float[Tensor, "m d"]
    input_scale: float
    seconds: float


def vary_one_choice(usual: FitConfig, others: Mapping[str, Sequence[Any]]) -> dict[Change, FitConfig]:
    """The usual choices as ``("reference", …)``, then for every other value of a choice the same but for that.

    Raises
    ------
    ValueError
        If there is no such choice.
    """
    if unknown := set(others) - set(asdict(usual)):
        raise ValueError(f"got other values of {sorted(unknown)}, expected some of {list(asdict(usual))}")
    reference = ", ".join(f"{name} {value}" for name, value in asdict(usual).items())
    changed = {(name, value): replace(usual, **{name: value}) for name, values in others.items() for value in values}
    return {("reference", reference): usual, **changed}


def fit_each_config(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    variants: Mapping[Change, FitConfig],
    *,
    source: int,
    num_factors: int,
    iterations: int,
    seed: int,
) -> dict[Change, Found | None]:
    """Fit an exponential transcoder under each of the choices, remembered in `folder`.

    Parameters
    ----------
    variants : mapping
        From :func:`vary_one_choice`, the reference first.
    source : int
        s, the same for all, so that their vectors are added at one layer.
    seed : int
        Of the directions that R is calibrated on, of the fit's start and of the random vectors.

    Returns
    -------
    dict
        What each variant found, None where no scale has its non-linearity; and last, as ``("random", …)``, as many
        random vectors of the reference's length.

    Raises
    ------
    ValueError
        If the reference itself has no scale, or a slice or the positions do not fit the model or the texts.
    """
    if (deepest := source + max(of.horizon for of in variants.values())) > (count := len(get_blocks(model))):
        raise ValueError(f"got a slice that ends at layer {deepest}, expected at most {count}, the model's blocks")
    settings = {"num_factors": num_factors, "iterations": iterations, "seed": seed}
    found: dict[Change, Found | None] = {}
    floor: dict[Change, Found] = {}
    for change, of in variants.items():
        at = {"source": source, "target": source + of.horizon, "positions": of.positions}
        cmap = CausalMap.from_model(model, tokenizer, texts, **at, reduction=_REDUCTIONS[of.prompts])
        try:
            R = calibrate(cmap, nonlinearity=of.nonlinearity, seed=seed)
        except ValueError:
            if not found:
                raise
            found[change] = None
            continue
        dct = cached_fit(folder, fit_exponential, cmap, input_scale=R, **settings)
        found[change] = Found(dct.steering_vectors(), R, dct.seconds)
        if not floor:
            random = random_vectors(num_factors, cmap.d_source, norm=R, seed=seed)
            floor["random", f"{num_factors} vectors"] = Found(random, R, 0.0)
    return {**found, **floor}
