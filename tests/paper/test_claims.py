import json
from pathlib import Path

import pytest
import yaml

from dctlib._io import ROOT
from dctlib.paper import claims as published
from dctlib.paper.claims import Verdict, compare_with_published

YES, NO, OPEN = Verdict.REPLICATES, Verdict.DOES_NOT, Verdict.UNDECIDED
FIGURES = ROOT / "figures" / "laptop"
BREAKER = json.loads((FIGURES / "circuit_breaker.json").read_text())


@pytest.mark.parametrize("notebook", published.RULES)
def test_every_rule_reads_what_its_notebook_writes(notebook):
    found = compare_with_published(notebook, json.loads((FIGURES / f"{notebook}.json").read_text()))
    assert found.numbers
    assert found.claims
    rules = found.claims | found.controls
    assert len(rules) == len(found.claims) + len(found.controls)
    assert all(isinstance(verdict, Verdict) for verdict in rules.values())
    assert all(rule in found._repr_markdown_() for rule in rules)


def test_every_rule_has_a_notebook():
    assert set(published.RULES) <= {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def breaker(dct, random):
    interval = lambda rate: {"mean": rate, "low": rate - 0.05, "high": rate + 0.05}  # noqa: E731
    test = {"DCT": interval(dct), "random": interval(random), "none": interval(0.0)}
    return BREAKER | {"test": BREAKER["test"] | test, "steered_asr": dct, "random_asr": random}


@pytest.mark.parametrize(
    ("dct", "random", "claim", "control"),
    [(0.9, 0.2, YES, YES), (0.9, 0.85, YES, OPEN), (0.5, 0.9, YES, NO), (0, 0, OPEN, OPEN)],
)
def test_a_claim_holds_only_where_intervals_part(dct, random, claim, control):
    found = compare_with_published("circuit_breaker", breaker(dct, random))
    assert [*found.claims.values(), *found.controls.values()] == [claim, control]
    claims = {YES: "replicates", NO: "does not replicate", OPEN: "undecided"}
    controls = {YES: "holds", NO: "fails", OPEN: "undecided"}
    expected = [("claim", claims[claim]), ("control", controls[control])]
    assert [(kind, verdict) for kind, _, verdict in found.rows] == expected
    assert all(f"| {' | '.join(row)} |" in found.verdict_table for row in found.rows)


@pytest.mark.parametrize(
    ("locked", "steered", "unlocked", "share"), [(0.03, 0.23, 0.65, 0.32), (0, 0.5, 0.5, 1), (0.1, 0.1, 0.1, 0)]
)
def test_what_a_vector_restores_is_counted_from_the_locked_model(locked, steered, unlocked, share):
    assert published.recovered_fraction(locked, steered, unlocked) == pytest.approx(share, abs=0.005)


def curves(objective):
    said = {"clean": -9.0, "random_best": -2.0, "dct_best": 8.0, "sure_rate": {"DCT": 1.0}}
    return said | {"width": {"4": {"objective": objective}}}


@pytest.mark.parametrize(("objective", "converges"), [([1, 8, 10, 10.1], YES), ([1, 4, 7, 10], NO), ([3], NO)])
def test_a_fit_converges_when_its_last_step_is_small_beside_its_rise(objective, converges):
    rule = f"a fit of 4 factors converges within {len(objective)} iterations"
    assert compare_with_published("training_curves", curves(objective)).claims[rule] is converges


@pytest.mark.parametrize(("score", "sure", "turns"), [(8.0, 0.5, YES), (8.0, 0.4, NO), (-1.0, 1.0, NO)])
def test_refusal_turns_into_compliance_only_where_it_is_said(score, sure, turns):
    found = compare_with_published("training_curves", curves([1, 2]) | {"dct_best": score, "sure_rate": {"DCT": sure}})
    assert found.claims["the best DCT vector turns refusal into compliance"] is turns


@pytest.mark.parametrize(("depths", "low", "verdict"), [((30, 30), 1, OPEN), ((30, 60), 1, YES), ((30, 60), -4, NO)])
def test_a_depth_horizon_suffices_only_where_depths_differ(depths, low, verdict):
    cells = [
        {
            "model": f"of {depth}",
            "depth": depth,
            "source": 5,
            "horizon": 5,
            "mean": low + 1,
            "low": low,
            "high": low + 2,
        }
        for depth in depths
    ]
    found = compare_with_published("deeper_models", {"cells": cells})
    assert [*found.claims.values()] == [verdict]
    assert [*found.controls.values()] == [YES if low > 0 else NO]


def test_a_notebook_with_nothing_published_is_refused():
    with pytest.raises(ValueError, match="notebooks with published numbers"):
        compare_with_published("organisms", {})


@pytest.mark.parametrize(("low", "high", "verdict"), [(0.1, 3.0, YES), (-3.0, -0.1, NO), (-0.1, 3.0, OPEN)])
def test_a_method_beats_another_only_where_the_interval_of_their_difference_does_not_hold_0(low, high, verdict):
    cell = lambda mean: {"mean": mean, "sd": 1.0, "scores": [mean]}  # noqa: E731
    difference = {"mean": 1.0, "low": low, "high": high}
    pairs = ("exponential - quadratic", "exponential - random", "quadratic - random", "most - least")
    found = {"exponential": {"1": cell(2.0), "4": cell(3.0)}, "quadratic": {"4": cell(1.0)}}
    judged = compare_with_published("sample_complexity", found | {"differences": dict.fromkeys(pairs, difference)})
    assert judged.numbers["quadratic, n = 4"] == (1.0, 8.12), "beside what is published for as many prompts"
    assert not any(label.endswith("n = 1") for label in judged.numbers)
    claims = ("exponential fits score above quadratic ones", "exponential fits score higher at n = 4 than at n = 1")
    assert [judged.claims[claim] for claim in claims] == [verdict] * 2
    assert judged.controls["every method scores above random vectors"] is verdict
    assert judged.intervals["exponential less quadratic"] == (low, high)


@pytest.mark.parametrize(("low", "high", "verdict"), [(1.5, 2.5, YES), (-1.0, 0.0, NO), (0.5, 2.5, OPEN)])
def test_an_aggregate_beats_the_average_only_outside_their_intervals(low, high, verdict):
    recorded = json.loads((FIGURES / "multiplicity.json").read_text())
    recorded["intervals"] = {"average": [0.5, 1.0], "max": [4.0, 5.0], "v_avg": [low, high], "v_svd": [2.0, 3.0]}
    found = compare_with_published("multiplicity", recorded)
    claim = "the mean direction scores above the average vector and below the best one"
    assert found.claims[claim] is verdict
    assert found.intervals["test score, mean direction"] == (low, high)
    assert f"[{low:.3g}, {high:.3g}]" in found._repr_markdown_()


def test_the_post_s_numbers_are_those_of_the_reference():
    assert published.published_numbers()["circuit_breaker"]["attack_success_rate"] == 0.62
    assert Path(ROOT / "writeup" / "published.yaml").is_file()


def test_rows_of_the_table_belong_to_notebooks_that_have_a_rule():
    rows = yaml.safe_load((ROOT / "writeup" / "claims.yaml").read_text())
    assert set(rows) <= set(published.RULES)
    assert all(set(row) <= {"label", "ours", "theirs", "interval"} for of in rows.values() for row in of)
