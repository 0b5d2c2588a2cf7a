"""The whole walk from a model and prompts to ranked vectors: what ``python -m dctlib discover`` computes."""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from tqdm import tqdm

from dctlib._io import write_json
from dctlib.discovery.explorer import Exploration, write_explorer
from dctlib.discovery.layer_scan import SCAN_VERSION, LayerSlice, scan_layers
from dctlib.discovery.options import DiscoverOptions, Method
from dctlib.discovery.ranking import MEASUREMENT_VERSION, Discovery, Measurements, measure_vectors, rank_vectors
from dctlib.evaluation.instructions import read_instructions, split_instructions
from dctlib.exchange.hub import check_replaceable, model_reference, save_folder
from dctlib.fits.calibration import calibrate
from dctlib.fits.solvers import fit_exponential, fit_linear, fit_quadratic
from dctlib.fits.transcoder import Transcoder
from dctlib.maps.causal import CausalMap
from dctlib.models.chat import Instruction, format_chat
from dctlib.models.fingerprint import chat_model_digest
from dctlib.models.loading import load_model
from dctlib.runs.cache import cache_key, cached_fit, remember
from dctlib.steering.scoring import single_token


@dataclass(frozen=True)
class DiscoveryPaths:
    """Places of what a discovery reads and writes.

    Attributes
    ----------
    cache : Path
        A folder of remembered fits and measurements.
    explorer, results : Path
        The HTML file to browse, and the JSON file of numbers and excerpts.
    shared : Path
        The folder to share, see :func:`dctlib.exchange.hub.save_folder`.
    """

    cache: Path
    explorer: Path
    results: Path
    shared: Path


def discover(options: DiscoverOptions, paths: DiscoveryPaths, *, progress: bool = True) -> Discovery:
    """Find, measure and rank the steering vectors of a model, and write what was found to `paths`.

    The steps are those of notebooks/discover.ipynb. Slices, fits and measurements are remembered in ``paths.cache``,
    so that another ranking of the same vectors takes seconds.

    Raises
    ------
    ValueError
        If an option does not fit the model, the prompts or `paths`, before anything is fitted; or as a step raises it.
    """

    def announce(step: int, text: str) -> None:
        if progress:
            tqdm.write(f"[{step}/5] {text}", file=sys.stderr)

    bars: dict[str, Any] = {"progress": progress}
    fitted, held_out = split_instructions(
        read_instructions(options.prompts, column=options.column), fit=options.fit_prompts, held_out=options.validation
    )
    check_replaceable(paths.shared)
    announce(1, f"load {options.model}")
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    for word in options.words or ():
        single_token(tokenizer, word, "words")
    chat = options.chat
    texts = format_chat(tokenizer, [*fitted, *held_out], **chat)[: len(fitted)]
    digest = chat_model_digest(model, tokenizer)

    slices: list[LayerSlice] = []
    source, target = options.source, options.target
    if source is None or target is None:
        announce(2, "scan three slices")
        scan = {"nonlinearity": options.nonlinearity, "seed": options.seed}
        key = cache_key(
            "scan", SCAN_VERSION, {"model": digest, "instructions": [fitted, held_out], "chat": chat, **scan}
        )
        slices = _remembered(
            paths.cache,
            key,
            list[LayerSlice],
            lambda: scan_layers(model, tokenizer, fitted, held_out, **scan, **bars, **chat),
        )
        source, target = slices[0].source, slices[0].target
    cmap = CausalMap.from_model(model, tokenizer, texts, source=source, target=target)

    announce(3, f"calibrate and fit {options.num_factors} factors to the slice {source} → {target}")
    R = calibrate(cmap, nonlinearity=options.nonlinearity, seed=options.seed)
    dct = fit_transcoder(
        options.method,
        paths.cache,
        cmap,
        num_factors=options.num_factors,
        iterations=options.iterations,
        input_scale=R,
        seed=options.seed,
    )
    name, revision = model_reference(options.model)
    save_folder(paths.shared, dct, model=name, revision=revision, texts=texts)

    announce(4, f"complete {len(held_out)} held-out instructions under {len(dct.steering_vectors())} vectors")
    settings: dict[str, Any] = {
        "words": options.words,
        "strength": options.strengths[0],
        "max_new_tokens": options.answer_tokens,
        "seed": options.seed,
    }
    inputs = {"model": digest, "map": cmap.digest, "dct": _digest(dct), "instructions": held_out, "chat": chat}
    measured = _remembered(
        paths.cache,
        cache_key("measurements", MEASUREMENT_VERSION, inputs | settings),
        Measurements,
        lambda: measure_vectors(model, tokenizer, cmap, dct, held_out, **settings, **bars, **chat),
    )

    announce(5, f"rank by {options.rank_by}")
    found = rank_vectors(
        model,
        tokenizer,
        dct,
        held_out,
        measured,
        rank_by=options.rank_by,
        shown=options.shown,
        strengths=options.strengths,
        max_new_tokens=options.answer_tokens,
        **bars,
        **chat,
    )
    results = found.summary(characters=options.shown_characters)
    write_json(paths.results, {"options": options.model_dump(), "slices": [*map(asdict, slices)], **results})
    write_explorer(paths.explorer, describe(options, found, held_out))
    return found


def _remembered(folder: Path, key: str, kind: Any, compute: Callable[[], Any]) -> Any:
    """Return what `compute` gave under this `key`, stored as the JSON of its type `kind`."""
    adapter = TypeAdapter(kind)
    return adapter.validate_python(remember(folder, key, lambda: adapter.dump_python(compute(), mode="json")))


def _digest(dct: Transcoder) -> str:
    """SHA-256 of what makes the steering vectors and their weights."""
    digest = hashlib.sha256(f"{dct.activation} {dct.input_scale}".encode())
    for tensor in (dct.V, dct.alpha):
        digest.update(tensor.double().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fit_transcoder(
    method: Method,
    folder: str | Path,
    cmap: CausalMap,
    *,
    num_factors: int,
    iterations: int,
    input_scale: float,
    seed: int,
) -> Transcoder:
    """Fit Δ(Rθ) for R = `input_scale` by the named method, remembered in `folder`.

    Linear and quadratic fits are made at scale 1. Their α is multiplied by R or R², because Δ̂(Rθ) is linear or
    quadratic in R; so all methods return a transcoder whose steering vectors have length R.
    """
    if method == "linear":
        dct = cached_fit(folder, fit_linear, cmap, num_factors=num_factors)
        return replace(dct, alpha=input_scale * dct.alpha, input_scale=input_scale)
    settings: dict[str, int] = {"num_factors": num_factors, "iterations": iterations, "seed": seed}
    if method == "quadratic":
        dct = cached_fit(folder, fit_quadratic, cmap, **settings)
        return replace(dct, alpha=input_scale**2 * dct.alpha, input_scale=input_scale)
    return cached_fit(folder, fit_exponential, cmap, input_scale=input_scale, **settings)


def describe(options: DiscoverOptions, found: Discovery, held_out: list[Instruction]) -> Exploration:
    """Return what the explorer shows of a discovery."""
    name, _ = model_reference(options.model)
    facts = {
        "model": options.model,
        "slice": f"{found.dct.source} → {found.dct.target}",
        "R": f"{found.dct.input_scale:.3g}",
        "method": options.method,
        "factors": str(options.num_factors),
        "fitted to": f"{options.fit_prompts} instructions",
        "completed on": f"{options.validation} others",
        "seed": str(options.seed),
        **{name: str(value) for name, value in options.chat.items()},
    }
    return Exploration.from_discovery(
        f"What {name} hides", facts, found, held_out, shown_characters=options.shown_characters
    )
