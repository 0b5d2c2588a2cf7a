"""The vectors of a discovery as one HTML file to browse from disk: a table, a map, and the completions of each."""

import base64
import hashlib
import importlib.resources
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs
from torch import Tensor
from torch.nn.functional import normalize

from dctlib._io import atomic_path
from dctlib.discovery.found import FoundVectors
from dctlib.discovery.snippets import SharedPlace
from dctlib.evaluation.judges import truncate
from dctlib.models.chat import Instruction, last_user_turn

_ABOUT = {
    "vector": "its number among the candidates",
    "found": "1 if the search returned it: held_out exceeds the score of no vector, and elsewhere, by a margin",
    "source": "the method that it comes from; random vectors are the control",
    "behaviour": "vectors with the same number make the model say much the same; those read on all requests have one",
    "multiple": "its length in units of R",
    "length": "its length in units of the residual stream",
    "damage": "mean KL(steered ‖ unsteered) in nats per token, on answers to harmless requests. Good: below the bound, "
    "0.5 unless you changed it. Bad: above 1, harmless answers change",
    "score": "0 to 1, on all requests: the product of the grades, counting relevance beyond the unsteered answer's; "
    "with a judge, the fraction judged True. Good: near 1. Bad: near 0",
    "held_out": "the score on the requests that no vector was chosen on; compare it with that of random directions. "
    "Good: close to score. Bad: far below it, the vector was chosen by luck",
    "elsewhere": "the score on harmless requests. Good: near 0. Bad: near held_out, it changes any answer as much",
    "excess": "score minus elsewhere: the effect on these requests beyond that on harmless ones. Good: near 1. "
    "Bad: near 0",
    "change": "0 to 1, on all requests: its score without a judge if the unsteered model withheld every answer. "
    "High where score is 0: it changes answers that were not withheld",
    "novelty": "0 to 1: how unlikely the unsteered model finds the beginnings of the completions. Good: near 1. "
    "Bad: near 0, what the model says anyway",
    "fluency": "0 to 1: 1 is as likely as the model's own answers. Good: above 0.7. Bad: below 0.37, often word salad",
    "varied": "fraction of completions that are not repetitive. Good: 1. Bad: below 0.8, it loops",
    "reopened": "fraction of completions that open differently from the unsteered ones, and not with another refusal. "
    "Good: near 1. Bad: near 0, the same opening or a refusal",
    "relevance": "0 to 1: how much likelier completions are after their own requests than after others. Good: near 1. "
    "Bad: near 0, off topic",
    "withheld": "0 to 1: how little the unsteered completions say about their requests; 1 for a refusal. Bad: near 0, "
    "there is nothing to unlock",
    "first": "the score in the first round: few requests and few tokens",
    "says": "a completion, cut short",
    "nearest": "the shown vector with the largest |cos(v, v′)|",
    "cosine": "cos(v, v′) with the nearest. Near 1 or −1: the same direction. Near 0: another one",
}


_FIRST = ["found", "behaviour", "source", "says", "excess", "held_out", "damage"]  # columns to the left of the others


@dataclass(frozen=True, eq=False)
class Exploration:
    """Content of a page about k vectors.

    Attributes
    ----------
    title : str
    facts : mapping of str to str
        How the run was made: model, slice, R, seed.
    table : DataFrame, k rows
        Column ``vector``, a unique number for each, and any others. The page shows, sorts and filters all of them.
    V, U : Tensor, (k, d_source) and (k, d_target)
        Of the table's rows, in its order: the vectors, and what each writes at the target layer.
    map : Tensor, (k + 1, 2)
        Where the page draws each vector, and in the last row the unsteered model; NaN where it draws none.
    instructions : sequence of str or of conversations
        The n instructions that were completed. Of a conversation, the last user turn is shown.
    unsteered : sequence of str
        Their completions without steering.
    completions : mapping of int to sequence of str
        Completions under a vector, by its number; some vectors of the table may have none.
    shown_characters : int
        Completions are cut to this length; what is cut is not in the file.
    hide : bool
        Whether completions are folded until asked for.
    snippets : mapping of int to pair of str
        For a vector, by its number, what a reader copies to use it: Python, and the command that exports it.

    Raises
    ------
    ValueError
        If counts or shapes do not fit each other, or a number of V or U is not finite.
    """

    title: str
    facts: Mapping[str, str]
    table: pd.DataFrame
    V: Float[Tensor, "k d_source"]
    U: Float[Tensor, "k d_target"]
    map: Float[Tensor, "k+1 2"]
    instructions: Sequence[Instruction]
    unsteered: Sequence[str]
    completions: Mapping[int, Sequence[str]]
    shown_characters: int
    hide: bool = True
    snippets: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def from_search(
        cls,
        title: str,
        facts: Mapping[str, str],
        found: FoundVectors,
        effects: Float[Tensor, "m d_target"],
        instructions: Sequence[Instruction],
        *,
        shown_characters: int,
        hide: bool = True,
        shared: SharedPlace | None = None,
    ) -> "Exploration":
        """Return the content of a page about all candidates of a search.

        Parameters
        ----------
        effects : Tensor, (m, d_target)
            What each row of ``found.directions`` writes at the target layer.
        instructions : sequence of str or of conversations
            Those that the search validated on.
        shared : SharedPlace, optional
            Where ``found.vectors`` were saved. Left out, the page says nothing of how to use them.
        """
        snippets: dict[int, tuple[str, str]] = {}
        if shared:
            lengths = found.table["length"].tolist()
            for number, (row, length) in enumerate(zip(found.rows, lengths, strict=True)):
                snippets[row] = shared.python(number, length), shared.export(number)
        order = found.candidates.index.tolist()
        table = found.candidates.astype({"found": int}).reset_index(names="vector")
        return cls(
            title=title,
            facts=facts,
            table=table.reindex(columns=["vector", *_FIRST, *table.columns.drop(["vector", *_FIRST])]),
            V=found.directions[order],
            U=effects.cpu()[order],
            map=found.map[[*order, -1]],
            instructions=instructions,
            unsteered=found.unsteered,
            completions=found.completions,
            shown_characters=shown_characters,
            hide=hide,
            snippets=snippets,
        )

    def __post_init__(self) -> None:
        if "vector" not in self.table or not len(self.table) or not self.table["vector"].is_unique:
            raise ValueError(f"got a table of {list(self.table)}, expected rows that each have a unique vector number")
        k, n = len(self.table), len(self.instructions)
        for name, rows in {"V": self.V, "U": self.U}.items():
            if rows.ndim != 2 or len(rows) != k or not rows.isfinite().all():
                raise ValueError(f"got {name} {tuple(rows.shape)}, expected ({k}, …), finite: index it by table.vector")
        if self.map.shape != (k + 1, 2):
            raise ValueError(f"got a map of shape {tuple(self.map.shape)}, expected ({k + 1}, 2)")
        for name, known in {"completions": self.completions, "snippets": self.snippets}.items():
            if unknown := set(known) - set(self.table["vector"]):
                raise ValueError(f"got {name} of {sorted(unknown)}, expected vectors of the table")
        counts = {len(self.unsteered), *map(len, self.completions.values())}
        if counts != {n}:
            raise ValueError(f"got {sorted(counts)} completions, expected {n}, one for each of the instructions")
        if self.shown_characters < 1:
            raise ValueError(f"got shown_characters={self.shown_characters}, expected at least 1; hide=True folds text")


def write_explorer(path: str | Path, run: Exploration) -> None:
    """Write one HTML file, whole or not at all, that needs no server and no network.

    Scripts and table styles come from the installed plotly and itables. The page's content security policy allows only
    scripts with these hashes, so generated text cannot run as a script.
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
    similar = {"v": _similar(run.V, vectors), "u": _similar(run.U, vectors)}
    columns: dict[str, list] = {"vector": vectors, **run.table.to_dict("list")}
    columns["nearest"] = [neighbours[0][0] if neighbours else None for neighbours in similar["v"]]
    columns["cosine"] = [neighbours[0][1] if neighbours else None for neighbours in similar["v"]]
    return {
        "columns": [
            {"name": name, "about": _ABOUT.get(name), "decimals": _decimals(columns[name])} for name in columns
        ],
        "rows": list(zip(*([_cell(value) for value in values] for values in columns.values()), strict=True)),
        "map": _rounded(run.map),
        "similar": similar,
        "instructions": [last_user_turn(instruction) for instruction in run.instructions],
        "unsteered": [truncate(text, run.shown_characters) for text in run.unsteered],
        "steered": {
            int(vector): [truncate(text, run.shown_characters) for text in texts]
            for vector, texts in run.completions.items()
        },
        "hide": run.hide,
        "snippets": {int(vector): list(texts) for vector, texts in run.snippets.items()},
    }


def _cell(value: Any) -> int | float | str | None:
    """Return a value for JSON: a number to five digits, to keep the file small; None if it is not finite; or text."""
    if value is None or type(value) is int:
        return value
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return str(value)


def _decimals(values: Sequence[Any]) -> int | None:
    """Return how many decimals show three digits of a typical number, or None for text."""
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
