"""The whole walk from a model and prompts to ranked vectors: what ``python -m dctlib discover`` computes."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dctlib._io import write_json
from dctlib.discovery.explorer import Exploration, write_explorer
from dctlib.discovery.found import FoundVectors
from dctlib.discovery.options import DiscoverOptions, SearchOptions, choose_slice
from dctlib.discovery.search import SEARCH_VERSION, search_vectors
from dctlib.discovery.snippets import SharedPlace
from dctlib.evaluation.instructions import read_instructions, split_instructions
from dctlib.evaluation.refusals import is_refusal
from dctlib.exchange.hub import check_replaceable, model_reference, save_folder
from dctlib.maps.causal import CausalMap
from dctlib.models.blocks import get_blocks
from dctlib.models.chat import format_chat
from dctlib.models.fingerprint import chat_model_digest
from dctlib.models.loading import load_model
from dctlib.runs.cache import cache_key, remember


@dataclass(frozen=True)
class DiscoveryPaths:
    """Places of what a discovery reads and writes.

    Attributes
    ----------
    cache : Path
        A folder of remembered searches.
    explorer, results : Path
        The HTML file to browse, and the JSON file of numbers and excerpts.
    shared : Path
        The folder to share, see :func:`dctlib.exchange.hub.save_folder`.
    """

    cache: Path
    explorer: Path
    results: Path
    shared: Path


def discover(options: DiscoverOptions, paths: DiscoveryPaths, *, progress: bool = True) -> FoundVectors:
    """Search for the steering vectors of a model, and write what was found to `paths`.

    The steps are those of notebooks/discover.ipynb. A search is remembered in ``paths.cache``, so that another ranking
    of the same vectors takes seconds.

    Raises
    ------
    ValueError
        If an option does not fit the model, the prompts or `paths`, before anything is fitted; or as
        :func:`dctlib.search_vectors`.
    """

    def announce(text: str) -> None:
        if progress:
            tqdm.write(text, file=sys.stderr)

    fitted, validation = split_instructions(
        read_instructions(options.prompts, column=options.column), fit=options.fit_prompts, held_out=options.validation
    )
    check_replaceable(paths.shared)
    announce(f"load {options.model}")
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    source, target = choose_slice(len(get_blocks(model)), options.source, options.target)
    texts = format_chat(tokenizer, [*fitted, *validation], **options.chat)[: len(fitted)]
    settings: dict[str, Any] = {
        "source": source,
        "target": target,
        **options.model_dump(include={*SearchOptions.model_fields, "num_factors", "seed"}),
    }
    inputs = {"model": chat_model_digest(model, tokenizer), "fit": fitted, "validation": validation}
    announce(f"search {source} → {target}: fit {len(fitted)} instructions, validate on {len(validation)} others")
    key = cache_key("search", SEARCH_VERSION, inputs | settings | {"chat": options.chat})
    settings |= {"progress": progress, **options.chat}
    result = remember(
        paths.cache,
        key,
        lambda: search_vectors(model, tokenizer, fit=fitted, validation=validation, **settings).to_result(),
    )
    found = FoundVectors.from_result(result).sorted_by(options.rank_by)

    cmap = CausalMap.from_model(model, tokenizer, texts, source=source, target=target)
    name, revision = model_reference(options.model)
    page = Exploration.from_search(
        f"What {name} hides",
        describe(options, found, target),
        found,
        cmap(found.directions.to(cmap.device, cmap.dtype)),
        validation,
        shown_characters=options.shown_characters,
        hide=any(map(is_refusal, found.unsteered)),
        shared=SharedPlace(os.path.relpath(paths.shared), options.model, source, options.chat),
    )
    rows = found.table.to_dict("records")
    facts = {"layer": source, "model": name, "revision": revision, "architecture": model.config.model_type}
    save_folder(paths.shared, found.vectors, rows, **facts, texts=texts)
    write_json(paths.results, {"options": options.model_dump(), "target": target, **found.summary()})
    write_explorer(paths.explorer, page)
    return found


def describe(options: DiscoverOptions, found: FoundVectors, target: int) -> dict[str, str]:
    """Return how a discovery was made, for the explorer."""
    return {
        "model": options.model,
        "slice": f"{found.layer} → {target}",
        "R": f"{found.input_scale:.3g}",
        "factors": str(options.num_factors),
        "found": f"{len(found.table)} of {len(found.candidates)} candidates",
        "best random direction, held-out": f"{found.random:.2f}",
        "fitted to": f"{options.fit_prompts} instructions",
        "validated on": f"{options.validation} others",
        "seed": str(options.seed),
        **{name: str(value) for name, value in options.chat.items()},
    }
