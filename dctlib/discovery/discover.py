"""From a model and prompts to ranked vectors and their files: what ``python -m dctlib discover`` does."""

import itertools
import json
import os
import sys
from dataclasses import dataclass, replace
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
from dctlib.runs.cache import cache_key, read_results, remember


@dataclass(frozen=True)
class DiscoveryPaths:
    """Paths that a discovery reads and writes.

    Attributes
    ----------
    root : Path
        The folder that holds ``.cache``, ``runs`` and ``vectors``.
    name : str
        Name of the folders in these.
    number : int
        From 2 on, it is added to the name, so that files of several searches stay apart.
    """

    root: Path
    name: str
    number: int = 1

    @property
    def cache(self) -> Path:
        """A folder of remembered searches, the same for every number."""
        return self.root / ".cache" / self.name

    @property
    def runs(self) -> Path:
        """The folder of the explorer and the results."""
        return self.root / "runs" / self._numbered

    @property
    def explorer(self) -> Path:
        """The HTML file to browse."""
        return self.runs / "discover_explorer.html"

    @property
    def results(self) -> Path:
        """The JSON file of numbers and excerpts."""
        return self.runs / "discover.json"

    @property
    def shared(self) -> Path:
        """The folder to share, see :func:`dctlib.exchange.hub.save_folder`."""
        return self.root / "vectors" / self._numbered / "discover"

    @property
    def _numbered(self) -> str:
        return self.name if self.number == 1 else f"{self.name}-{self.number}"

    def for_search(self, key: str) -> "DiscoveryPaths":
        """Return the paths with the lowest number that hold the search of this key or are still free."""
        numbered = (replace(self, number=number) for number in itertools.count(self.number))
        return next(
            each
            for each in numbered
            if _search_of(each.results) == key or not (each.results.exists() or each.shared.exists())
        )


def discover(options: DiscoverOptions, paths: DiscoveryPaths) -> tuple[FoundVectors, DiscoveryPaths]:
    """Search for the steering vectors of a model, and write what was found to `paths`.

    The steps are those of notebooks/discover.ipynb. A search is remembered in ``paths.cache``, so another ranking of
    the same vectors takes seconds; it replaces the files of that search. Another search writes to the next free number.

    Returns
    -------
    found : FoundVectors
    paths : DiscoveryPaths
        Where they were written.

    Raises
    ------
    ValueError
        If an option does not fit the model, the prompts or `paths`, before anything is fitted; or as
        :func:`dctlib.search_vectors`.
    """
    fitted, validation = split_instructions(
        read_instructions(options.prompts, column=options.column), fit=options.fit_prompts, held_out=options.validation
    )
    check_replaceable(paths.shared)
    _announce(f"load {options.model}")
    device = None if options.device == "auto" else options.device
    model, tokenizer = load_model(options.model, device=device, dtype=options.dtype)
    source, target = choose_slice(len(get_blocks(model)), options.source, options.target)
    texts = format_chat(tokenizer, [*fitted, *validation], **options.chat)[: len(fitted)]
    settings: dict[str, Any] = {
        "source": source,
        "target": target,
        **options.model_dump(include={*SearchOptions.model_fields, "num_factors", "seed"}),
    }
    inputs = {"model": chat_model_digest(model, tokenizer), "fit": fitted, "validation": validation}
    key = cache_key("discover", SEARCH_VERSION, inputs | settings | {"chat": options.chat})
    first, paths = paths, paths.for_search(key)
    check_replaceable(paths.shared)
    if paths != first:
        _announce(f"{_shown(first.runs)} holds another search, so this one goes to {_shown(paths.runs)}")

    def search() -> dict[str, Any]:
        _announce(f"search {source} → {target}: fit {len(fitted)} instructions, validate on {len(validation)} others")
        options_of_search = settings | options.chat
        found = search_vectors(model, tokenizer, fit=fitted, validation=validation, **options_of_search)
        cmap = CausalMap.from_model(model, tokenizer, texts, source=source, target=target)
        return found.to_result() | {"effects": cmap(found.directions.to(cmap.device, cmap.dtype))}

    if stored := read_results(paths.cache, [key]):
        _announce(f"this search is remembered: only its vectors are ranked again, by {options.rank_by}")
    result = stored.get(key) or remember(paths.cache, key, search)
    effects = result.pop("effects")
    found = FoundVectors.from_result(result).sorted_by(options.rank_by)
    name, revision = model_reference(options.model)
    page = Exploration.from_search(
        f"What {name} hides",
        describe(options, found, target),
        found,
        effects,
        validation,
        shown_characters=options.shown_characters,
        hide=any(map(is_refusal, found.unsteered)),
        shared=SharedPlace(_shown(paths.shared), options.model, source, options.chat),
    )
    # The results first, because they name the search that the files belong to.
    write_json(paths.results, {"search": key, "options": options.model_dump(), "target": target, **found.summary()})
    rows = found.table.to_dict("records")
    facts = {"layer": source, "model": name, "revision": revision, "architecture": model.config.model_type}
    save_folder(paths.shared, found.vectors, rows, **facts, texts=texts)
    write_explorer(paths.explorer, page)
    return found, paths


def _announce(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _search_of(results: Path) -> str | None:
    """Return the key of the search that a file of results comes from, or None if it names none."""
    try:
        return json.loads(results.read_text(encoding="utf-8")).get("search")
    except (OSError, ValueError):
        return None


def _shown(path: Path) -> str:
    return os.path.relpath(path)


def describe(options: DiscoverOptions, found: FoundVectors, target: int) -> dict[str, str]:
    """Return how a discovery was made, by name, to show in the explorer."""
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
