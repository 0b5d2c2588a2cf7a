"""Our numbers beside the post's, and a rule for each claim of the post that judges whether it replicates."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any

import yaml

from dctlib._io import ROOT
from dctlib.paper.comparisons import METHODS, published_differences

Results = Mapping[str, Any]
"""The numbers of a notebook, or of the post."""

Ends = tuple[float, float]
"""The low and the high end of an interval."""

Pair = tuple[float | None, float | None]
"""Our number and the post's, None where there is none."""


class Verdict(Enum):
    """Whether a claim replicates, or a control holds; undecided where our own data cannot tell."""

    REPLICATES = "replicates"
    DOES_NOT = "does not replicate"
    UNDECIDED = "undecided"


_OF_CONTROLS = {Verdict.REPLICATES: "holds", Verdict.DOES_NOT: "fails", Verdict.UNDECIDED: "undecided"}


@dataclass(frozen=True)
class Replication:
    """The results of one notebook against the post.

    Attributes
    ----------
    claims : dict
        A claim of the post → its verdict.
    controls : dict
        A condition that a claim needs and the post does not report, such as that random vectors fail → its verdict.
    numbers : dict
        What was measured → our number and the post's.
    intervals : dict
        Some of the numbers → the 95 % interval around ours.
    """

    claims: dict[str, Verdict]
    controls: dict[str, Verdict] = field(default_factory=dict)
    numbers: dict[str, Pair] = field(default_factory=dict)
    intervals: dict[str, Ends] = field(default_factory=dict)

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """A kind (``claim`` or ``control``), a statement and a verdict in words: the claims, then the controls."""
        claims = [("claim", statement, verdict.value) for statement, verdict in self.claims.items()]
        controls = [("control", statement, _OF_CONTROLS[verdict]) for statement, verdict in self.controls.items()]
        return claims + controls

    @property
    def verdict_table(self) -> str:
        """The rows as a Markdown table."""
        rows = [f"| {kind} | {statement} | {verdict} |" for kind, statement, verdict in self.rows]
        return "\n".join(["| | statement | verdict |", "|:---|:------------|:----|", *rows])

    def _repr_markdown_(self) -> str:
        rows = [
            f"| {label} | {_cell(ours, self.intervals.get(label))} | {_cell(theirs)} |"
            for label, (ours, theirs) in self.numbers.items()
        ]
        return "\n".join(["| | measured | published |", "|:--|--:|--:|", *rows, "", self.verdict_table])


def compare_with_published(notebook: str, results: Results) -> Replication:
    """Compare the results of a notebook with the post's numbers, and judge its claims.

    Parameters
    ----------
    notebook : str
        The stem of a notebook that reproduces a figure or table of the post.
    results : mapping
        The content of figures/<profile>/<stem>.json.

    Raises
    ------
    ValueError
        If the post reports nothing that this notebook measures.
    """
    if notebook not in RULES:
        raise ValueError(f"got {notebook!r}, expected one of {', '.join(RULES)}: notebooks with published numbers")
    post = published_numbers()
    judged = RULES[notebook](results, post)
    numbers: dict[str, Pair] = {}
    intervals: dict[str, Ends] = {}
    for row in _rows().get(notebook, ()):
        ours = _lookup(results, row["ours"]) if "ours" in row else None
        theirs = _lookup(post, row["theirs"]) if "theirs" in row else None
        numbers[row["label"]] = (ours, theirs)
        if "interval" in row:
            intervals[row["label"]] = _ends(_lookup(results, row["interval"]))
    return Replication(judged.claims, judged.controls, numbers | judged.numbers, intervals | judged.intervals)


@cache
def published_numbers() -> dict[str, Any]:
    """Return the content of writeup/published.yaml."""
    return yaml.safe_load((ROOT / "writeup" / "published.yaml").read_text(encoding="utf-8"))


def recovered_fraction(locked: float, steered: float, unlocked: float) -> float:
    """Return (steered − locked) / (unlocked − locked), the share of a lock's loss of accuracy that a vector restores.

    Without a loss the share is 0.
    """
    return (steered - locked) / (unlocked - locked) if unlocked > locked else 0.0


@cache
def _rows() -> dict[str, list[dict[str, str]]]:
    """Return the content of writeup/claims.yaml."""
    return yaml.safe_load((ROOT / "writeup" / "claims.yaml").read_text(encoding="utf-8"))


def _lookup(tree: Any, path: str) -> Any:
    """Follow a path, ``a/b/0``, through mappings and lists."""
    for part in path.split("/"):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def _ends(interval: Any) -> Ends:
    """Return the ends of an interval that is a pair, or a mapping with ``low`` and ``high``."""
    low, high = (interval["low"], interval["high"]) if isinstance(interval, Mapping) else interval
    return low, high


def _cell(number: float | None, interval: Ends | None = None) -> str:
    if number is None:
        return ""
    return f"{number:.3g}" if interval is None else f"{number:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]"


def _decide(holds: bool) -> Verdict:
    return Verdict.REPLICATES if holds else Verdict.DOES_NOT


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst verdict: does not, then undecided, then replicates."""
    found = list(verdicts)
    return next((worse for worse in (Verdict.DOES_NOT, Verdict.UNDECIDED) if worse in found), Verdict.REPLICATES)


def _above(one: Ends, other: Ends) -> Verdict:
    """Judge whether an interval lies above another; undecided where they overlap."""
    if one[0] > other[1]:
        return Verdict.REPLICATES
    return Verdict.DOES_NOT if one[1] < other[0] else Verdict.UNDECIDED


def _training_curves(ours: Results, _post: Results) -> Replication:
    width, curve = next(reversed(ours["width"].items()))
    objective = curve["objective"]
    rise = max(objective) - min(objective)
    last_step = abs(objective[-1] - objective[-2:][0])
    turned = ours["dct_best"] > 0 > ours["clean"] and ours["sure_rate"]["DCT"] >= 0.5
    claims = {
        "the best DCT vector turns refusal into compliance": turned,
        f"a fit of {width} factors converges within {len(objective)} iterations": last_step < 0.1 * rise,
        f"causal importance grows over the fit of {width} factors": objective[-1] > objective[0],
    }
    return Replication(
        {claim: _decide(holds) for claim, holds in claims.items()},
        {"the best random vector scores below zero": _decide(ours["random_best"] < 0)},
    )


def _sample_complexity(ours: Results, post: Results) -> Replication:
    published = post["sample_complexity"]
    numbers: dict[str, Pair] = {}
    for method, name in METHODS.items():
        for n, cell in ours.get(method, {}).items():
            if method in published and int(n) in published["n"]:
                mean, _sd = published[method][published["n"].index(int(n))]
                numbers[f"{name}, n = {n}"] = (cell["mean"], mean)
    theirs = published_differences()
    claims, intervals = {}, {}
    for pair, found in ours["differences"].items():
        better, worse = pair.split(" - ")
        if worse != "random" and better in METHODS:
            claims[f"{METHODS[better]} fits score above {METHODS[worse]} ones"] = _above(_ends(found), (0, 0))
            label = f"{METHODS[better]} less {METHODS[worse]}"
            numbers[label] = (found["mean"], theirs[pair].mean)
            intervals[label] = _ends(found)
    least, most = min(map(int, ours["exponential"])), max(map(int, ours["exponential"]))
    if most > least:
        more = f"exponential fits score higher at n = {most} than at n = {least}"
        claims[more] = _above(_ends(ours["differences"]["most - least"]), (0, 0))
    above_random = (_above(_ends(ours["differences"][f"{each} - random"]), (0, 0)) for each in METHODS if each in ours)
    return Replication(claims, {"every method scores above random vectors": _all(above_random)}, numbers, intervals)


def _multiplicity(ours: Results, post: Results) -> Replication:
    published = post["multiplicity"]
    intervals = {row: _ends(ends) for row, ends in ours["intervals"].items()}
    share = ours["count"] / ours["of"]
    share_at_least_5 = ours["count_at_least_5"] / ours["of"]
    claims = {
        "at least a quarter of the factors score at least 5": _decide(share_at_least_5 >= 1 / 4),
        "the qualifying directions differ: mean absolute cosine below 0.5": _decide(ours["mean_abs_cosine"] < 0.5),
    }
    for row, name in {"v_avg": "mean", "v_svd": "first singular"}.items():
        above_average = _above(intervals[row], intervals["average"])
        below_best = _above(intervals["max"], intervals[row])
        claim = f"the {name} direction scores above the average vector and below the best one"
        claims[claim] = _all([above_average, below_best])
    published_share = published["vectors_with_score_at_least_5"] / published["of"]
    numbers: dict[str, Pair] = {
        "share of factors that score at least 5": (share_at_least_5, published_share),
        f"share that scores at least {ours['threshold']:g}": (share, None),
    }
    control = f"at least a quarter of the factors score at least {ours['threshold']:g}"
    return Replication(claims, {control: _decide(share >= 1 / 4)}, numbers)


def _ablation(ours: Results, _post: Results) -> Replication:
    claims = {}
    intervals = {}
    for side in ("source", "target"):
        intervals[side] = {row: _ends(ends) for row, ends in ours[side]["intervals"].items()}
        average = intervals[side]["average"]
        aggregates = {row: intervals[side][row] for row in ("v_avg", "v_svd")}
        better = max(aggregates, key=lambda row: ours[side][row])
        claims[f"ablating a single {side} direction scores below zero on average"] = _above((0, 0), average)
        claims[f"ablating either aggregate {side} direction scores above the average single one"] = _all(
            _above(ends, average) for ends in aggregates.values()
        )
        claims[f"ablating the better aggregate {side} direction scores above the best single one"] = _above(
            aggregates[better], intervals[side]["max"]
        )
    claims["ablating target directions scores below ablating source ones, in every row"] = _all(
        _above(ends, intervals["target"][row]) for row, ends in intervals["source"].items()
    )
    return Replication(claims)


def _deeper_models(ours: Results, _post: Results) -> Replication:
    horizons = sorted({cell["horizon"] for cell in ours["cells"]})
    middle = horizons[len(horizons) // 2]
    cells = {
        f"best vector, t − s = {middle}, {cell['model']}, s = {cell['source']}": cell
        for cell in ours["cells"]
        if cell["horizon"] == middle
    }
    intervals = {label: _ends(cell) for label, cell in cells.items()}
    turned = _all(_above(ends, (0, 0)) for ends in intervals.values())
    several_depths = len({cell["depth"] for cell in ours["cells"]}) > 1
    claim = f"a fixed depth horizon, t − s = {middle}, suffices in models of every depth"
    return Replication(
        {claim: turned if several_depths else Verdict.UNDECIDED},
        {f"with t − s = {middle} the best vector scores above zero at every source layer": turned},
        {label: (cell["mean"], None) for label, cell in cells.items()},
        intervals,
    )


def _circuit_breaker(ours: Results, _post: Results) -> Replication:
    steered, clean, random = (_ends(ours["test"][method]) for method in ("DCT", "none", "random"))
    return Replication(
        {"a DCT vector gets past the circuit breaker": _above(steered, clean)},
        {"random vectors get past it less often": _above(steered, random)},
    )


def _password_locked(ours: Results, post: Results) -> Replication:
    published = post["password_locked"]
    restored = recovered_fraction(ours["locked"], ours["steered"], ours["unlocked"])
    published_restored = recovered_fraction(
        published["locked"], published["steered"], published["unlocked_by_password"]
    )
    above_zero = ours["vectors_above_zero"]["DCT"] / len(ours["validation"]["DCT"])
    published_above_zero = published["vectors_above_zero"] / post["defaults"]["num_factors"]
    steered, random = (_ends(ours["test"][state]) for state in ("steered", "random"))
    return Replication(
        {"a DCT vector restores at least a quarter of the accuracy that the lock removed": _decide(restored >= 0.25)},
        {"random vectors restore less": _above(steered, random)},
        {
            "share of the lost accuracy restored": (restored, published_restored),
            "share of vectors that solve a validation question": (above_zero, published_above_zero),
        },
    )


def _synthetic_recovery(ours: Results, post: Results) -> Replication:
    published = {"projected": "jacobian_init_10_iterations", "random": "random_init_100_iterations"}
    claims = {}
    for start, name in published.items():
        least = post["synthetic"][name]["recovered_above_0.99"] - 0.05
        claim = f"from a {start} start the share of factors recovered is at least the published one less 5 points"
        claims[claim] = _decide(ours[start]["recovered"] >= least)
    return Replication(claims)


RULES: dict[str, Callable[[Results, Results], Replication]] = {
    "sample_complexity": _sample_complexity,
    "circuit_breaker": _circuit_breaker,
    "password_locked": _password_locked,
    "training_curves": _training_curves,
    "multiplicity": _multiplicity,
    "ablation": _ablation,
    "deeper_models": _deeper_models,
    "synthetic_recovery": _synthetic_recovery,
}
"""The stem of a notebook → the rule for its claims, in order of weight: the post's headline claims come first."""
