"""The vectors of a discovery as one HTML file to browse from disk: a table, a map, and the completions of each."""

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
from dctlib.discovery.completions import SteeredCompletions
from dctlib.discovery.ranking import Discovery
from dctlib.evaluation.judges import truncate
from dctlib.models.chat import Instruction, last_user_turn

_ABOUT = {
    "vector": "its number in the fit",
    "alpha": "weight α of the factor in the fit",
    "change": "length of Δ(v) at the target layer",
    "divergence": "mean KL(steered ‖ clean) of the next token, in nats",
    "next": "token that most often comes first",
    "score": "mean logit(positive word) − logit(negative word) of the next token",
    "cluster": "vectors that point one way share a number",
    "fluent": "fraction of its completions that are fluent and differ from the unsteered one",
    "perplexity": "median, under the clean model, of its completions at the first strength",
    "nearest": "the shown factor of the largest |cos(v, v′)|",
    "cosine": "cos(v, v′) with the nearest",
}


@dataclass(frozen=True, eq=False)
class Exploration:
    """Content of a page about k vectors.

    Attributes
    ----------
    title : str
    facts : mapping of str to str
        How the run was made: model, slice, R, method, seed.
    table : DataFrame, k rows
        The result of :func:`dctlib.discovery.ranking.rank_and_cluster`. Any further column is shown, sorted and
        filtered too.
    V, U : Tensor, (k, d_source) and (k, d_target)
        Directions of the table's rows, in its order.
    instructions : sequence of str or of conversations
        The n instructions that were completed. Of a conversation, the last user turn is shown.
    completions : SteeredCompletions
        Their completions, without steering and at each strength.
    completed : sequence of int
        The ``vector`` numbers, in the order of ``completions.steered[strength]``; the table may hold more.
    shown_characters : int
        Completions are cut to this length; what is cut is not in the file.
    norms : Tensor, (k, layers + 1), optional
        Length of the change of the residual stream at each layer.
    hide : bool
        Whether completions are folded until asked for.

    Raises
    ------
    ValueError
        If counts or shapes do not fit each other, or a number is not finite.
    """

    title: str
    facts: Mapping[str, str]
    table: pd.DataFrame
    V: Float[Tensor, "k d_source"]
    U: Float[Tensor, "k d_target"]
    instructions: Sequence[Instruction]
    completions: SteeredCompletions
    completed: Sequence[int]
    shown_characters: int
    norms: Float[Tensor, "k depths"] | None = None
    hide: bool = True

    @classmethod
    def from_discovery(
        cls,
        title: str,
        facts: Mapping[str, str],
        found: Discovery,
        instructions: Sequence[Instruction],
        *,
        shown_characters: int,
    ) -> "Exploration":
        """Return the content of a page about a discovery, with its completions of `instructions`."""
        order = found.ranked["vector"].tolist()
        return cls(
            title=title,
            facts=facts,
            table=found.ranked,
            V=found.dct.V.cpu()[order],
            U=found.dct.U.cpu()[order],
            instructions=instructions,
            completions=found.completions,
            completed=found.shown,
            shown_characters=shown_characters,
            norms=found.change_norms,
        )

    def __post_init__(self) -> None:
        if "vector" not in self.table or not len(self.table) or not self.table["vector"].is_unique:
            raise ValueError(f"got a table of {list(self.table)}, expected rows that each have their own vector number")
        k, n, completed = len(self.table), len(self.instructions), len(self.completed)
        for name, rows in {"V": self.V, "U": self.U, "norms": self.norms}.items():
            if rows is not None and (rows.ndim != 2 or len(rows) != k or not rows.isfinite().all()):
                raise ValueError(f"got {name} {tuple(rows.shape)}, expected ({k}, …), finite: index it by table.vector")
        if len(set(self.completed) & set(self.table["vector"])) < completed:
            raise ValueError(f"got completed {list(self.completed)}, expected vectors of the table, each once")
        steered = self.completions.steered.values()
        counts = {len(self.completions.perplexity), *map(len, steered)}
        if counts != {completed} or not steered:
            raise ValueError(
                f"got completions of {sorted(counts)} vectors, expected {completed}, one for each completed"
            )
        counts = {len(each) for vectors in steered for each in vectors} | {len(self.completions.clean)}
        if counts != {n}:
            raise ValueError(f"got {sorted(counts)} completions, expected {n}, one for each of the instructions")
        if self.shown_characters < 1:
            raise ValueError(f"got shown_characters={self.shown_characters}, expected at least 1; hide=True folds text")


def write_explorer(path: str | Path, run: Exploration) -> None:
    """Write one HTML file, whole or not at all, that needs no server and no network.

    Scripts and table styles come from the installed plotly and itables. The page's content security policy names those
    scripts by their hashes, so that no text that a model generated can run.
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
    """Return the table library as itables ships it: an ES module whose default export becomes a global."""
    bundle = _text("itables", "html/dt_bundle.js")
    script, found = re.subn(r"export\{[^}]*?([\w$]+) as default[^}]*\}", r"globalThis.DataTable=\1", bundle)
    if found != 1:
        raise RuntimeError(f"got {found} default exports in itables' dt_bundle.js, expected 1: install itables 2.9")
    return script


def _content(run: Exploration) -> dict[str, Any]:
    """Return the data of the page, as JSON."""
    vectors = run.table["vector"].tolist()
    completions = run.completions
    strengths = sorted(completions.steered)
    similar = {"v": _similar(run.V, vectors), "u": _similar(run.U, vectors)}
    perplexity = dict(zip(run.completed, completions.perplexity, strict=True))
    columns: dict[str, list] = {"vector": vectors, **run.table.rename(columns={"alike": "cluster"}).to_dict("list")}
    columns.setdefault("perplexity", [perplexity.get(vector) for vector in vectors])
    columns["nearest"] = [neighbours[0][0] if neighbours else None for neighbours in similar["v"]]
    columns["cosine"] = [neighbours[0][1] if neighbours else None for neighbours in similar["v"]]
    steered = {
        int(vector): [
            [truncate(text, run.shown_characters) for text in completions.steered[strength][row]]
            for strength in strengths
        ]
        for row, vector in enumerate(run.completed)
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
        "instructions": [last_user_turn(instruction) for instruction in run.instructions],
        "clean": [truncate(text, run.shown_characters) for text in completions.clean],
        "strengths": strengths,
        "start": strengths.index(next(iter(completions.steered))),
        "steered": steered,
        "hide": run.hide,
    }


def _cell(value: Any) -> int | float | str | None:
    """Return what JSON can hold: five digits, which keep the file small; None for a number that is not finite; text."""
    if value is None or type(value) is int:
        return value
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return str(value)


def _decimals(values: Sequence[Any]) -> int | None:
    """Return the digits after the point that show three of a typical number, or None for text."""
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
    """Return for each row the vectors with the largest |cos| to it, each with its signed cosine."""
    unit = normalize(directions.double().cpu(), dim=1)
    cosines = unit @ unit.T
    nearest = cosines.abs().fill_diagonal_(-1).topk(min(most, len(vectors) - 1), dim=1).indices
    return [[(vectors[j], round(cosines[i, j].item(), 3)) for j in row] for i, row in enumerate(nearest.tolist())]


def _map(directions: Float[Tensor, "k d"]) -> dict[str, list]:
    """Return the first two principal components of the directions, and the fraction of variance that each explains."""
    directions = directions.double().cpu()
    padded = pad(directions - directions.mean(0), (0, 1, 0, 1))  # so that even one row has two components
    left, singular_values, _ = torch.linalg.svd(padded, full_matrices=False)
    explained = singular_values.square() / singular_values.square().sum().clamp(min=1e-30)
    return {"points": _rounded((left * singular_values)[:-1, :2]), "explained": explained[:2].tolist()}
