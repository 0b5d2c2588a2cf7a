"""Choice of a slice: a narrow fit to each of three, judged by the completions under its vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.discovery.completions import complete_at_strengths
from dctlib.fits.calibration import calibrate
from dctlib.fits.solvers import fit_exponential
from dctlib.maps.causal import CausalMap
from dctlib.models.blocks import get_blocks
from dctlib.models.chat import Instruction, format_chat
from dctlib.steering.effects import effects
from dctlib.steering.generation import generate_completions

SCAN_VERSION = 2
"""Part of the key of remembered scans: raise it with any change that alters what :func:`scan_layers` returns."""

_SOURCES = (1 / 6, 1 / 3, 1 / 2)  # as fractions of the depth


@dataclass(frozen=True)
class LayerSlice:
    """A slice s → t and the fraction of completions under its vectors that are fluent and new.

    Attributes
    ----------
    source, target : int
        Layers s and t, as in ``hidden_states``.
    input_scale : float
        R.
    found : float
        Mean of ``SteeredCompletions.fluent`` over the vectors that change the next token most.
    """

    source: int
    target: int
    input_scale: float
    found: float


@dataclass(frozen=True)
class ScanSettings:
    """Size of a scan: what is fitted to each slice, and how it is judged.

    Attributes
    ----------
    num_factors, iterations : int
        Of each fit.
    judged : int
        Vectors of each slice that are judged: those with the largest effect on the next token.
    answer_tokens : int
        Tokens of a completion.
    max_perplexity : float
        Largest perplexity of a fluent completion under the clean model.
    """

    num_factors: int = 16
    iterations: int = 3
    judged: int = 8
    answer_tokens: int = 16
    max_perplexity: float = 20.0


_DEFAULTS = ScanSettings()


def scan_layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[Instruction],
    held_out: Sequence[Instruction],
    *,
    nonlinearity: float = 0.5,
    settings: ScanSettings = _DEFAULTS,
    seed: int = 0,
    progress: bool = True,
    **chat: Any,
) -> list[LayerSlice]:
    """Fit a narrow transcoder to each of three slices, and sort the slices by how much its vectors find.

    Each slice is a third of the model deep. The sources lie at a sixth, a third and half of the depth.

    Parameters
    ----------
    instructions, held_out : sequence of str or of conversations
        In no chat format: those that are fitted, and those that are completed.
    **chat
        Options of :func:`dctlib.format_chat`, such as ``system``.

    Returns
    -------
    list of LayerSlice
        The most promising one first. Slices that no R makes as non-linear as asked are left out.

    Raises
    ------
    ValueError
        If no slice is left.
    """
    depth = len(get_blocks(model))
    fitted_texts = format_chat(tokenizer, instructions, **chat)
    texts = format_chat(tokenizer, held_out, **chat)
    options: dict[str, Any] = {"max_new_tokens": settings.answer_tokens, "progress": progress}
    clean = generate_completions(model, tokenizer, texts, **options)
    options |= {"strengths": [1.0], "max_perplexity": settings.max_perplexity, **chat}
    slices = []
    unscaled = None
    for source in sorted({int(fraction * depth) for fraction in _SOURCES}):
        target = min(depth, source + max(1, depth // 3))
        cmap = CausalMap.from_model(model, tokenizer, fitted_texts, source=source, target=target)
        try:
            R = calibrate(cmap, nonlinearity=nonlinearity, seed=seed)
        except ValueError as error:
            unscaled = error
            continue
        dct = fit_exponential(
            cmap,
            num_factors=settings.num_factors,
            input_scale=R,
            iterations=settings.iterations,
            seed=seed,
            progress=progress,
        )
        vectors = dct.steering_vectors()
        divergence = effects(model, tokenizer, texts, vectors, layer=source, progress=progress).divergence.mean(1)
        strongest = vectors[divergence.argsort()[-settings.judged :]]
        completions = complete_at_strengths(model, tokenizer, held_out, clean, strongest, layer=source, **options)
        slices.append(LayerSlice(source, target, R, sum(completions.fluent) / len(completions.fluent)))
    if not slices:
        raise ValueError(
            "no slice has a scale of this non-linearity; try another, or name source and target"
        ) from unscaled
    return sorted(slices, key=lambda each: -each.found)
