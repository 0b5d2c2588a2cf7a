"""What the post reports beside what we measured, and which of its claims replicate: one rule a claim, in code."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import yaml

from dctlib._io import ROOT

Results = Mapping[str, Any]

Verdict = bool | None
"""Whether a claim holds; None where our own intervals are too wide to tell."""


@dataclass(frozen=True)
class Replication:
    """One notebook's results against the post.

    Attributes
    ----------
    numbers : dict
        What was measured → (our number, the post's), with None where one of them gives none.
    claims : dict
        A claim of the post → whether our numbers bear it out.
    controls : dict
        What the post does not report and a claim needs, such as that random vectors fail → whether it is so here.
    intervals : dict
        Of some of the numbers → the 95 % interval around ours.
    """

    numbers: dict[str, tuple[float | None, float | None]]
    claims: dict[str, Verdict]
    controls: dict[str, Verdict] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """Which claims replicate, which do not, and which stay open; which controls hold, and which fail."""
        verdicts = [("Replicates", self.claims, True), ("Does not replicate", self.claims, False)]
        verdicts += [("Undecided", self.claims, None)]
        verdicts += [("Control, holds", self.controls, True), ("Control, fails", self.controls, False)]
        verdicts += [("Control, undecided", self.controls, None)]
        parts = []
        for verdict, rules, holds in verdicts:
            if named := [rule for rule, held in rules.items() if held is holds]:
                parts.append(f"**{verdict}**: {'; '.join(named)}.")
        return " ".join(parts)

    def _repr_markdown_(self) -> str:
        rows = [
            f"| {what} | {_cell(ours, self.intervals.get(what))} | {_cell(theirs)} |"
            for what, (ours, theirs) in self.numbers.items()
        ]
        return "\n".join(["| | measured | published |", "|:--|--:|--:|", *rows, "", self.sentence])


def compare_with_published(notebook: str, results: Results) -> Replication:
    """Set the results of a notebook beside the post's.

    Parameters
    ----------
    notebook : str
        Its stem: one of those that reproduce a figure or table of the post.
    results : mapping
        What the notebook wrote to figures/<profile>/<stem>.json.

    Raises
    ------
    ValueError
        If the post has nothing to set beside this notebook.
    """
    if notebook not in RULES:
        raise ValueError(f"got {notebook!r}, expected one of {', '.join(RULES)}: notebooks with published numbers")
    return RULES[notebook](results, published_numbers())


@cache
def published_numbers() -> dict[str, Any]:
    """writeup/published.yaml."""
    return yaml.safe_load((ROOT / "writeup" / "published.yaml").read_text(encoding="utf-8"))


def recovered_fraction(locked: float, steered: float, unlocked: float) -> float:
    """How much of the accuracy that a lock took a vector gives back; 0 where it took none."""
    return (steered - locked) / (unlocked - locked) if unlocked > locked else 0.0


def _cell(number: float | None, interval: tuple[float, float] | None = None) -> str:
    around = "" if interval is None else f" [{interval[0]:.3g}, {interval[1]:.3g}]"
    return "" if number is None else f"{number:.3g}{around}"


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    """False if one is; else None if one is; else True."""
    found = list(verdicts)
    return False if False in found else None if None in found else True


def _every_pair(ones: Sequence[float], others: Sequence[float]) -> Verdict:
    """Whether the one is the larger in every pair; None where pairs differ."""
    larger = {one > other for one, other in zip(ones, others, strict=True)}
    return larger.pop() if len(larger) == 1 else None


def _above(one: tuple[float, float], other: tuple[float, float]) -> Verdict:
    """Whether an interval lies above another; None where they overlap."""
    return True if one[0] > other[1] else False if one[1] < other[0] else None


def _around(ours: Results, row: str) -> tuple[float, float]:
    """The interval of a row of :class:`dctlib.paper.experiments.aggregates.AggregateScores`."""
    low, high = ours["intervals"][row]
    return low, high


def _tested(ours: Results, method: str) -> tuple[float, float]:
    """The interval of a method on test prompts, a :class:`dctlib.evaluation.statistics.Interval`."""
    return ours["test"][method]["low"], ours["test"][method]["high"]


def _training_curves(ours: Results, post: Results) -> Replication:
    width, curve = next(reversed(ours["width"].items()))
    objective = curve["objective"]
    last_step = abs(objective[-1] - objective[-2:][0])
    return Replication(
        {
            "test score of the best exponential vector": (
                ours["dct_best"],
                post["sample_complexity"]["exponential"][3][0],
            ),
            "test score of the best random vector": (ours["random_best"], None),
            "test score without a vector": (ours["clean"], None),
        },
        {
            "the best DCT vector turns refusal into compliance": ours["dct_best"] > 0 > ours["clean"]
            and ours["sure_rate"]["DCT"] >= 0.5,
            f"a fit of {width} factors settles within {len(objective)} iterations": last_step
            < 0.1 * (max(objective) - min(objective)),
            f"causal importance rises while {width} factors are fitted": objective[-1] > objective[0],
        },
        {"the best random vector does not": ours["random_best"] < 0},
    )


def _sample_complexity(ours: Results, post: Results) -> Replication:
    order = ("exponential", "quadratic", "linear_projected", "linear")
    names = {method: method.replace("linear_projected", "projected linear") for method in order}
    sizes, there = list(ours["exponential"]), post["sample_complexity"]
    least, most = sizes[0], sizes[-1]
    shared = [n for n in sizes if int(n) in there["n"]]
    exponential, quadratic, projected, linear = (ours[method][most]["scores"] for method in order)
    return Replication(
        {
            f"{names[method]}, n = {n}": (ours[method][n]["mean"], there[method][there["n"].index(int(n))][0])
            for method in order
            for n in shared
        },
        {
            "exponential fits score highest, in every shuffle": _all(
                _every_pair(exponential, other) for other in (quadratic, projected, linear)
            ),
            "quadratic fits score above linear ones, in every shuffle": _all(
                _every_pair(quadratic, other) for other in (projected, linear)
            ),
            "projected linear fits score above full ones, in every shuffle": _every_pair(projected, linear),
            f"exponential fits gain from more instructions, n = {most} against {least}, in every shuffle": _every_pair(
                exponential, ours["exponential"][least]["scores"]
            ),
        },
        {
            "every method beats random vectors, in every shuffle": _all(
                _every_pair(ours[method][most]["scores"], ours["random"]["0"]["scores"]) for method in order
            )
        },
    )


def _multiplicity(ours: Results, post: Results) -> Replication:
    there, table = post["multiplicity"], post["table_3_add_source"]
    numbers: dict[str, tuple[float | None, float | None]] = {
        "share of factors that score at least 5": (
            ours["count_at_least_5"] / ours["of"],
            there["vectors_with_score_at_least_5"] / there["of"],
        ),
        f"share that scores at least {ours['threshold']:g}": (ours["count"] / ours["of"], None),
        "condition number": (ours["condition_number"], there["condition_number"]),
        "mean absolute cosine": (ours["mean_abs_cosine"], there["mean_abs_cosine"]),
        "its standard deviation": (ours["sd_abs_cosine"], there["sd_abs_cosine"]),
    }
    rows = {"average": "average", "max": "best", "v_avg": "v_avg", "v_svd": "v_svd"}
    around = {row: _around(ours, row) for row in rows}
    return Replication(
        numbers
        | {f"test score, {label}": (ours[row], table[row]) for row, label in rows.items()}
        | {"test score, v_svd with the other sign": (ours["v_svd_negated"], None)},
        {
            "a quarter of the factors or more score at least 5": ours["count_at_least_5"] >= ours["of"] / 4,
            "they are no copies of one direction": ours["mean_abs_cosine"] < 0.5,
            **{
                f"{name} beats the average vector and not the best": _all(
                    [_above(around[name], around["average"]), _above(around["max"], around[name])]
                )
                for name in ("v_avg", "v_svd")
            },
        },
        {f"a quarter of the factors or more score at least {ours['threshold']:g}": ours["count"] >= ours["of"] / 4},
        {f"test score, {label}": around[row] for row, label in rows.items()},
    )


def _ablation(ours: Results, post: Results) -> Replication:
    tables = {"source": post["table_4_ablate_source"], "target": post["table_5_ablate_target"]}
    rows = {
        "average": "average of single factors",
        "max": "best single factor",
        "v_avg": "mean",
        "v_svd": "first singular",
    }
    claims, around = {}, {side: {row: _around(ours[side], row) for row in rows} for side in tables}
    for side, of in around.items():
        better = max(("v_avg", "v_svd"), key=lambda name: ours[side][name])
        claims[f"ablating a single {side} direction scores below zero on average"] = _above((0, 0), of["average"])
        claims[f"ablating an aggregate {side} direction beats the average single one"] = _all(
            _above(of[name], of["average"]) for name in ("v_avg", "v_svd")
        )
        claims[f"ablating the better aggregate beats even the best single {side} direction"] = _above(
            of[better], of["max"]
        )
    claims["target directions score lower than source ones, in every row"] = _all(
        _above(around["source"][row], around["target"][row]) for row in rows
    )
    return Replication(
        {
            f"{side}, {label}": (ours[side][row], table[row])
            for side, table in tables.items()
            for row, label in rows.items()
        },
        claims,
        intervals={f"{side}, {label}": around[side][row] for side in tables for row, label in rows.items()},
    )


def _deeper_models(ours: Results, _post: Results) -> Replication:
    cells = ours["cells"]
    horizons = sorted({cell["horizon"] for cell in cells})
    middle = horizons[len(horizons) // 2]
    fixed = {
        f"best vector, t − s = {middle}, {cell['model']}, s = {cell['source']}": cell
        for cell in cells
        if cell["horizon"] == middle
    }
    around = {where: (cell["low"], cell["high"]) for where, cell in fixed.items()}
    turned = _all(_above(of, (0, 0)) for of in around.values())
    return Replication(
        {where: (cell["mean"], None) for where, cell in fixed.items()},
        {
            f"a fixed depth horizon, t − s = {middle}, suffices in models of every depth": turned
            if len({cell["depth"] for cell in cells}) > 1
            else None
        },
        {f"with t − s = {middle} every source layer tried turns the score": turned},
        intervals=around,
    )


def _circuit_breaker(ours: Results, post: Results) -> Replication:
    there = post["circuit_breaker"]
    return Replication(
        {
            "attack success, best DCT vector": (ours["steered_asr"], there["attack_success_rate"]),
            "attack success, best random vector": (ours["random_asr"], None),
            "attack success, difference of means (supervised)": (ours["test"]["difference of means"]["mean"], None),
            "attack success, no vector": (ours["clean_asr"], None),
            "attack success, Zou et al.'s own latent attack": (None, there["prior_latent_attack"]),
        },
        {"a DCT vector gets past the circuit breaker": _above(_tested(ours, "DCT"), _tested(ours, "none"))},
        {"random vectors get past it less often": _above(_tested(ours, "DCT"), _tested(ours, "random"))},
        {
            f"attack success, {label}": _tested(ours, method)
            for label, method in {
                "best DCT vector": "DCT",
                "best random vector": "random",
                "difference of means (supervised)": "difference of means",
                "no vector": "none",
            }.items()
        },
    )


def _password_locked(ours: Results, post: Results) -> Replication:
    there = post["password_locked"]
    pairs = {"locked": "locked", "unlocked": "unlocked_by_password", "steered": "steered"}
    numbers = {f"accuracy, {state}": (ours[state], there[name]) for state, name in pairs.items()}
    above = ours["vectors_above_zero"]["DCT"] / len(ours["validation"]["DCT"])
    return Replication(
        {
            **numbers,
            "accuracy, best random vector": (ours["random"], None),
            "share of the lost accuracy restored": (
                recovered_fraction(ours["locked"], ours["steered"], ours["unlocked"]),
                recovered_fraction(there["locked"], there["steered"], there["unlocked_by_password"]),
            ),
            "share of vectors that solve anything": (above, there["vectors_above_zero"] / 512),
        },
        {
            "a vector restores at least a quarter of what the lock took": recovered_fraction(
                ours["locked"], ours["steered"], ours["unlocked"]
            )
            >= 0.25,
        },
        {"random vectors restore less": _above(_tested(ours, "steered"), _tested(ours, "random"))},
        {f"accuracy, {state}": _tested(ours, state) for state in pairs}
        | {"accuracy, best random vector": _tested(ours, "random")},
    )


def _synthetic_recovery(ours: Results, post: Results) -> Replication:
    starts = {"projected": "jacobian_init_10_iterations", "random": "random_init_100_iterations"}
    there = {start: post["synthetic"][name] for start, name in starts.items()}
    numbers = {}
    for start in starts:
        numbers[f"{start} start, mean best cosine"] = (ours[start]["mean_max_cosine"], there[start]["mean_max_cosine"])
        numbers[f"{start} start, above .99"] = (ours[start]["recovered"], there[start]["recovered_above_0.99"])
    return Replication(
        numbers,
        {
            f"from a {start} start the share above .99 is at least the published one, less 5 points": ours[start][
                "recovered"
            ]
            >= there[start]["recovered_above_0.99"] - 0.05
            for start in starts
        },
    )


RULES: dict[str, Callable[[Results, Results], Replication]] = {
    "training_curves": _training_curves,
    "sample_complexity": _sample_complexity,
    "multiplicity": _multiplicity,
    "ablation": _ablation,
    "deeper_models": _deeper_models,
    "circuit_breaker": _circuit_breaker,
    "password_locked": _password_locked,
    "synthetic_recovery": _synthetic_recovery,
}
