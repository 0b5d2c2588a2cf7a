"""A run's factors as one HTML file to browse from disk: a table, a map, and what each factor makes the model say."""

import base64
import hashlib
import importlib.resources
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs
from torch import Tensor
from torch.nn.functional import normalize, pad

from dctlib._io import atomic_path
from dctlib.discovery.discover import Discovery, SteeredCompletions
from dctlib.evaluation.judges import truncate

_ABOUT = {
    "vector": "its number in the fit",
    "alpha": "weight α of the factor in the fit",
    "change": "length of Δ(v) at the target layer",
    "divergence": "mean KL(steered ‖ clean) of the next token, in nats",
    "next": "token that most often comes first",
    "score": "mean logit(positive word) − logit(negative word) of the next token",
    "cluster": "vectors that point one way share a number",
    "fluent": "fraction of its completions that are fluent and not what the model says anyway",
    "perplexity": "median, under the clean model, of its completions at the first strength",
    "nearest": "the shown factor of the largest |cos(v, v′)|",
    "cosine": "cos(v, v′) with the nearest",
}


@dataclass(frozen=True, eq=False)
class Exploration:
    """What a page shows of k factors.

    Attributes
    ----------
    title : str
    facts : mapping of str to str
        How the run was made: model, slice, R, method, seed.
    table : DataFrame, k rows
        What :func:`dctlib.discovery.discover.rank_and_cluster` gives; any further column is shown, and sorts and filters too.
    V, U : Tensor, (k, d_source) and (k, d_target)
        Directions of the table's rows, in its order.
    instructions : sequence of str
        The n that were completed.
    reading : Reading
        Their completions, without steering and at each strength.
    read_rows : sequence of int
        The ``vector`` numbers, in the order of ``reading.steered[strength]``; the table may hold more.
    shown_characters : int
        Completions are cut to this length; what is cut is not in the file.
    norms : Tensor, (k, layers + 1), optional
        Length of the change of the residual stream at each layer.
    hide : bool
        Whether completions are folded until asked for.
    """

    title: str
    facts: Mapping[str, str]
    table: pd.DataFrame
    V: Float[Tensor, "k d_source"]
    U: Float[Tensor, "k d_target"]
    instructions: Sequence[str]
    reading: SteeredCompletions
    read_rows: Sequence[int]
    shown_characters: int
    norms: Float[Tensor, "k depths"] | None = None
    hide: bool = True

    @classmethod
    def of(
        cls,
        title: str,
        facts: Mapping[str, str],
        found: Discovery,
        instructions: Sequence[str],
        *,
        shown_characters: int,
        hide: bool = True,
    ) -> "Exploration":
        """All that a discovery measured, and what it read of `instructions`."""
        order = found.ranked["vector"].tolist()
        directions = found.dct.V.cpu()[order], found.dct.U.cpu()[order]
        read = instructions, found.reading, found.shown
        return cls(title, facts, found.ranked, *directions, *read, shown_characters, found.growth, hide)

    def __post_init__(self) -> None:
        if "vector" not in self.table or not len(self.table) or not self.table["vector"].is_unique:
            raise ValueError(f"got a table of {list(self.table)}, expected rows that each have their own vector number")
        k, n, read = len(self.table), len(self.instructions), len(self.read_rows)
        for name, rows in {"V": self.V, "U": self.U, "norms": self.norms}.items():
            if rows is not None and (rows.ndim != 2 or len(rows) != k or not rows.isfinite().all()):
                raise ValueError(f"got {name} {tuple(rows.shape)}, expected ({k}, …), finite: index it by table.vector")
        if len(set(self.read_rows) & set(self.table["vector"])) < read:
            raise ValueError(f"got read_rows {list(self.read_rows)}, expected vectors of the table, each once")
        counts = {len(self.reading.perplexity), *map(len, self.reading.steered.values())}
        if counts != {read} or not self.reading.steered:
            raise ValueError(f"got a reading of {sorted(counts)} vectors, expected {read}, one for each of read_rows")
        counts = {len(said) for of in self.reading.steered.values() for said in of} | {len(self.reading.clean)}
        if counts != {n}:
            raise ValueError(f"got {sorted(counts)} completions, expected {n}, one for each of the instructions")
        if self.shown_characters < 1:
            raise ValueError(f"got shown_characters={self.shown_characters}, expected at least 1; hide=True folds text")


def write_explorer(path: str | Path, run: Exploration) -> None:
    """Write one HTML file, whole or not at all, that needs no server and no network.

    Scripts and table styles come from the installed plotly and itables. The page's security policy names those scripts
    by their hashes, so that nothing which a model says can run.
    """
    environment = Environment(loader=PackageLoader("dctlib.discovery", "."), autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    scripts = {"plots": get_plotlyjs(), "tables": _datatables(), "own": _text("dctlib.discovery", "explorer.js")}
    page = environment.get_template("explorer.html.j2").render(
        run=run,
        data=_content(run),
        scripts=scripts,
        hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts.values()],
        styles=[_text("itables", "html/dt_bundle.css"), _text("dctlib.discovery", "explorer.css")],
    )
    with atomic_path(path) as partial:
        partial.write_text(page, encoding="utf-8")


def _text(package: str, name: str) -> str:
    return importlib.resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _datatables() -> str:
    """The table library as itables ships it, an ES module whose default export becomes a global."""
    bundle = _text("itables", "html/dt_bundle.js")
    script, found = re.subn(r"export\{[^}]*?([\w$]+) as default[^}]*\}", r"globalThis.DataTable=\1", bundle)
    if found != 1:
        raise RuntimeError(f"got {found} default exports in itables' dt_bundle.js, expected 1: install itables 2.9")
    return script


def _content(run: Exploration) -> dict[str, Any]:
    """All that the page shows, as JSON."""
    vectors, reading, strengths = run.table["vector"].tolist(), run.reading, sorted(run.reading.steered)
    similar = {"v": _similar(run.V, vectors), "u": _similar(run.U, vectors)}
    perplexity = dict(zip(run.read_rows, reading.perplexity, strict=True))
    columns: dict[str, list] = {"vector": vectors, **run.table.rename(columns={"alike": "cluster"}).to_dict("list")}
    columns.setdefault("perplexity", [perplexity.get(vector) for vector in vectors])
    for place, name in enumerate(["nearest", "cosine"]):
        columns[name] = [near[0][place] if near else None for near in similar["v"]]
    steered = {
        int(vector): [[truncate(text, run.shown_characters) for text in reading.steered[by][i]] for by in strengths]
        for i, vector in enumerate(run.read_rows)
    }
    return {
        "columns": [
            {"name": name, "about": _ABOUT.get(name), "decimals": _decimals(columns[name])} for name in columns
        ],
        "rows": list(zip(*([_cell(value) for value in values] for values in columns.values()), strict=True)),
        "map": _map(run.V),
        "similar": similar,
        "norms": None if run.norms is None else _rounded(run.norms),
        "median": None if run.norms is None else run.norms.quantile(0.5, 0).tolist(),
        "instructions": list(run.instructions),
        "clean": [truncate(text, run.shown_characters) for text in reading.clean],
        "strengths": strengths,
        "start": strengths.index(next(iter(reading.steered))),
        "steered": steered,
        "hide": run.hide,
    }


def _cell(value: Any) -> int | float | str | None:
    """What JSON can hold: five digits, which keep the file small, None for a number that is not finite, or text."""
    if value is None or type(value) is int:
        return value
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return str(value)


def _decimals(values: Sequence[Any]) -> int | None:
    """Digits after the point that show three of a typical number; None for text."""
    cells = [_cell(value) for value in values]
    if any(isinstance(cell, str) for cell in cells):
        return None
    sizes = sorted(abs(cell) for cell in cells if isinstance(cell, int | float) and cell)
    if all(size == int(size) for size in sizes):
        return 0
    return min(max(2 - math.floor(math.log10(sizes[len(sizes) // 2])), 0), 4)


def _rounded(rows: Float[Tensor, "k columns"]) -> list[list]:
    return [[_cell(value) for value in row] for row in rows.tolist()]


def _similar(directions: Float[Tensor, "k d"], vectors: Sequence[int], most: int = 6) -> list[list[tuple[int, float]]]:
    """For each row, the numbers of those with the largest |cos| to it, and the signed cosines."""
    unit = normalize(directions.double().cpu(), dim=1)
    cosines = unit @ unit.T
    order = cosines.abs().fill_diagonal_(-1).topk(min(most, len(vectors) - 1), dim=1).indices
    return [[(vectors[j], round(cosines[i, j].item(), 3)) for j in near] for i, near in enumerate(order.tolist())]


def _map(directions: Float[Tensor, "k d"]) -> dict[str, list]:
    """The first two principal components of the directions, and the fraction of the variance that each explains."""
    # Padded with zeros, so that even one row has two components.
    centred = directions.double().cpu() - directions.double().cpu().mean(0)
    left, sizes, _ = torch.linalg.svd(pad(centred, (0, 1, 0, 1)), full_matrices=False)
    explained = sizes.square() / sizes.square().sum().clamp(min=1e-30)
    return {"points": _rounded((left * sizes)[:-1, :2]), "explained": explained[:2].tolist()}
