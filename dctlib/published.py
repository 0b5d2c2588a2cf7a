"""What the post reports beside what we measured, and which of its claims replicate: one rule a claim, in code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    """

    numbers: dict[str, tuple[float | None, float | None]]
    claims: dict[str, bool]

    @property
    def sentence(self) -> str:
        """Which claims replicate, and which do not."""
        parts = []
        for verdict, holds in (("Replicates", True), ("Does not replicate", False)):
            if claims := [claim for claim, held in self.claims.items() if held == holds]:
                parts.append(f"**{verdict}**: {'; '.join(claims)}.")
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


def _cell(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"


def _training_curves(ours: Results, post: Results) -> Replication:
    widest = list(ours["width"].values())[-1]["objective"]
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
            "the best DCT vector turns refusal into compliance, the best random vector does not": ours["dct_best"]
            > 0
            > ours["random_best"],
            "wide fits converge within ten iterations": abs(widest[-1] - widest[-2:][0]) < 0.05 * abs(widest[-1]),
            "causal importance rises while a wide fit is trained": widest[-1] > widest[0],
        },
    )


def _sample_complexity(ours: Results, post: Results) -> Replication:
    order = ("exponential", "quadratic", "linear_projected", "linear")
    names = {method: method.replace("linear_projected", "projected linear") for method in order}
    most = list(ours["exponential"])[-1]
    means = [ours[method][most]["mean"] for method in order]
    floor = ours["random"]["0"]["mean"]
    return Replication(
        {
            f"{names[method]}, n = {most} here, n = 8 there": (mean, post["sample_complexity"][method][3][0])
            for method, mean in zip(order, means, strict=True)
        },
        {
            "every method beats random vectors": min(means) > floor,
            "exponential fits score highest": means[0] == max(means),
            "quadratic fits score above linear ones": means[1] > max(means[2:]),
            "a full linear fit does no better than no vector": means[3] <= ours["clean"] + 3,
        },
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
            "many factors, not one, unlock the model": ours["count"] >= ours["of"] / 4,
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
        claims[f"ablating an aggregate {side} direction beats the average single one"] = (
            min(aggregates) > ours[side]["average"]
        )
        claims[f"ablating the better aggregate beats even the best single {side} direction"] = (
            max(aggregates) > ours[side]["max"]
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
            f"one depth horizon, t − s = {middle}, unlocks the model from every source layer": min(fixed.values()) > 0,
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
        {
            "a DCT vector gets past the circuit breaker": ours["test"]["DCT"]["low"] > ours["test"]["none"]["high"],
            "random vectors get past it less often": ours["test"]["DCT"]["low"] > ours["test"]["random"]["high"],
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
            "share of vectors that solve anything": (above, there["vectors_above_zero"] / 512),
        },
        {
            "a vector restores at least a quarter of what the password unlocks": ours["steered"]
            >= ours["unlocked"] / 4,
            "random vectors do not": ours["test"]["steered"]["low"] > ours["test"]["random"]["high"],
        },
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
