"""Where in depth to fit, when nobody says: a narrow fit to each slice, judged by how much it makes a model say."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.discovery.discover import complete_at_strengths
from dctlib.fits.calibration import calibrate
from dctlib.fits.solvers import fit_exponential
from dctlib.maps.causal import CausalMap
from dctlib.models.blocks import get_blocks
from dctlib.models.chat import format_chat
from dctlib.steering.effects import effects
from dctlib.steering.generation import generate_completions

_SHARES = (1 / 6, 1 / 3, 1 / 2)


@dataclass(frozen=True)
class LayerSlice:
    """A slice s → t, and the fraction of its vectors' completions that are fluent and new.

    Attributes
    ----------
    source, target : int
    input_scale : float
        R.
    found : float
        Of the completions of held-out instructions under the vectors that change the next token most: the fraction
        that differ from the clean model's and that it finds fluent.
    """

    source: int
    target: int
    input_scale: float
    found: float


def scan_layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    held_out: Sequence[str],
    *,
    nonlinearity: float = 0.5,
    num_factors: int = 16,
    iterations: int = 3,
    judged: int = 8,
    answer_tokens: int = 16,
    max_perplexity: float = 20.0,
    seed: int = 0,
    progress: bool = True,
) -> list[LayerSlice]:
    """Fit `num_factors` factors to three slices, each a third of the model deep, from a sixth, a third and half of it.

    Parameters
    ----------
    instructions, held_out : sequence of str
        What is fitted, and what the vectors are judged on: user turns, in no chat format.
    judged : int
        Vectors of each slice whose completions are read, those with the largest effect on the next token.
    max_perplexity : float
        Under the clean model, of a fluent completion.

    Returns
    -------
    list of Slice
        The most promising one first; those that no scale makes as non-linear as asked are left out.

    Raises
    ------
    ValueError
        If that is all of them.
    """
    depth, unscaled = len(get_blocks(model)), None
    texts, asked, found = format_chat(tokenizer, instructions), format_chat(tokenizer, held_out), []
    speaking = {"max_new_tokens": answer_tokens, "progress": progress}
    clean = generate_completions(model, tokenizer, asked, **speaking)
    speaking = speaking | {"strengths": [1.0], "max_perplexity": max_perplexity}
    for s in sorted({int(share * depth) for share in _SHARES}):
        cmap = CausalMap.from_model(model, tokenizer, texts, source=s, target=min(depth, s + max(1, depth // 3)))
        try:
            R = calibrate(cmap, nonlinearity=nonlinearity, seed=seed)
        except ValueError as error:
            unscaled = error
            continue
        dct = fit_exponential(
            cmap, num_factors=num_factors, input_scale=R, iterations=iterations, seed=seed, progress=progress
        )
        vectors = dct.steering_vectors()
        order = effects(model, tokenizer, asked, vectors, layer=s, progress=progress).divergence.mean(1).argsort()
        said = complete_at_strengths(model, tokenizer, held_out, clean, vectors[order[-judged:]], layer=s, **speaking)
        found.append(LayerSlice(s, cmap.target or depth, R, sum(said.fluent) / len(said.fluent)))
    if not found:
        raise ValueError(
            "no slice has a scale of this non-linearity; try another, or name source and target"
        ) from unscaled
    return sorted(found, key=lambda each: -each.found)
