"""What the post reports beside what we measured, and which of its claims replicate: one rule a claim, in code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pandas as pd
import yaml

from dctlib.store import ROOT

Results = Mapping[str, Any]


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
    """

    numbers: dict[str, tuple[float | None, float | None]]
    claims: dict[str, bool]
    controls: dict[str, bool] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """Which claims replicate, and which do not; which controls hold, and which fail."""
        verdicts = [("Replicates", self.claims, True), ("Does not replicate", self.claims, False)]
        verdicts += [("Control, holds", self.controls, True), ("Control, fails", self.controls, False)]
        parts = []
        for verdict, rules, holds in verdicts:
            if named := [rule for rule, held in rules.items() if held == holds]:
                parts.append(f"**{verdict}**: {'; '.join(named)}.")
        return " ".join(parts)

    @property
    def table(self) -> pd.DataFrame:
        """The numbers, one row each."""
        return pd.DataFrame.from_dict(self.numbers, orient="index", columns=["measured", "published"])

    def _repr_markdown_(self) -> str:
        rows = [f"| {what} | {_cell(ours)} | {_cell(theirs)} |" for what, (ours, theirs) in self.numbers.items()]
        return "\n".join(["| | measured | published |", "|:--|--:|--:|", *rows, "", self.sentence])


def beside(notebook: str, results: Results) -> Replication:
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
    return RULES[notebook](results, published())


@cache
def published() -> dict[str, Any]:
    """writeup/published.yaml."""
    return yaml.safe_load((ROOT / "writeup" / "published.yaml").read_text(encoding="utf-8"))


def restored(locked: float, steered: float, unlocked: float) -> float:
    """How much of the accuracy that a lock took a vector gives back; 0 where it took none."""
    return (steered - locked) / (unlocked - locked) if unlocked > locked else 0.0


def _cell(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"


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
            "the best DCT vector turns refusal into compliance": ours["dct_best"] > 0 > ours["clean"],
            f"a fit of {width} factors settles within {len(objective)} iterations": last_step
            < 0.1 * (max(objective) - min(objective)),
            f"causal importance rises while {width} factors are fitted": objective[-1] > objective[0],
        },
        {"the best random vector does not": ours["random_best"] < 0},
    )


def _sample_complexity(ours: Results, post: Results) -> Replication:
    order = ("exponential", "quadratic", "linear_projected", "linear")
    names = {method: method.replace("linear_projected", "projected linear") for method in order}
    least, most = (list(ours["exponential"])[end] for end in (0, -1))
    means = [ours[method][most]["mean"] for method in order]
    return Replication(
        {
            f"{names[method]}, n = {most} here, n = 8 there": (mean, post["sample_complexity"][method][3][0])
            for method, mean in zip(order, means, strict=True)
        },
        {
            "exponential fits score highest": means[0] == max(means),
            "quadratic fits score above linear ones": means[1] > max(means[2:]),
            "projected linear fits score above full ones": means[2] > means[3],
            f"exponential fits gain from more instructions, n = {most} against {least}": means[0]
            > ours["exponential"][least]["mean"],
        },
        {"every method beats random vectors": min(means) > ours["random"]["0"]["mean"]},
    )


def _multiplicity(ours: Results, post: Results) -> Replication:
    there, table = post["multiplicity"], post["table_3_add_source"]
    numbers = {
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
    return Replication(
        numbers | {f"test score, {label}": (ours[row], table[row]) for row, label in rows.items()},
        {
            "a quarter of the factors or more score at least 5": ours["count_at_least_5"] >= ours["of"] / 4,
            f"a quarter or more score at least {ours['threshold']:g}": ours["count"] >= ours["of"] / 4,
            "they are no copies of one direction": ours["mean_abs_cosine"] < 0.5,
            **{
                f"{name} beats the average vector and not the best": ours["average"] < ours[name] < ours["max"]
                for name in ("v_avg", "v_svd")
            },
        },
    )


def _ablation(ours: Results, post: Results) -> Replication:
    tables = {"source": post["table_4_ablate_source"], "target": post["table_5_ablate_target"]}
    rows = {
        "average": "average of single factors",
        "max": "best single factor",
        "v_avg": "mean",
        "v_svd": "first singular",
    }
    claims = {}
    for side in tables:
        aggregates = [ours[side][name] for name in ("v_avg", "v_svd")]
        claims[f"ablating a single {side} direction scores below zero on average"] = ours[side]["average"] < 0
        claims[f"ablating an aggregate {side} direction beats the average single one"] = (
            min(aggregates) > ours[side]["average"]
        )
        claims[f"ablating the better aggregate beats even the best single {side} direction"] = (
            max(aggregates) > ours[side]["max"]
        )
    claims["target directions score lower than source ones, in every row"] = all(
        ours["target"][row] < ours["source"][row] for row in rows
    )
    return Replication(
        {
            f"{side}, {label}": (ours[side][row], table[row])
            for side, table in tables.items()
            for row, label in rows.items()
        },
        claims,
    )


def _deeper_models(ours: Results, _post: Results) -> Replication:
    cells = ours["cells"]
    horizons = sorted({cell["horizon"] for cell in cells})
    middle = horizons[len(horizons) // 2]
    fixed = {f"{cell['model']}, s = {cell['source']}": cell["mean"] for cell in cells if cell["horizon"] == middle}
    return Replication(
        {f"best vector, t − s = {middle}, {where}": (mean, None) for where, mean in fixed.items()},
        {
            f"a fixed depth horizon suffices: with t − s = {middle} every source layer tried unlocks the model": min(
                fixed.values()
            )
            > 0,
        },
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
        {"a DCT vector gets past the circuit breaker": ours["test"]["DCT"]["low"] > ours["test"]["none"]["high"]},
        {"random vectors get past it less often": ours["test"]["DCT"]["low"] > ours["test"]["random"]["high"]},
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
                restored(ours["locked"], ours["steered"], ours["unlocked"]),
                restored(there["locked"], there["steered"], there["unlocked_by_password"]),
            ),
            "share of vectors that solve anything": (above, there["vectors_above_zero"] / 512),
        },
        {
            "a vector restores at least a quarter of what the lock took": restored(
                ours["locked"], ours["steered"], ours["unlocked"]
            )
            >= 0.25,
        },
        {"random vectors restore less": ours["test"]["steered"]["low"] > ours["test"]["random"]["high"]},
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
            f"from a {start} start it recovers at least what was published, within 5 points": ours[start]["recovered"]
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
