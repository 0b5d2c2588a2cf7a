"""What the README says was measured is what the recorded files say."""

import json
import re
from collections import Counter

import pytest
import yaml

from dctlib._io import ROOT
from dctlib.paper.claims import RULES, Verdict, compare_with_published

README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").replace("*", "").split())


def recorded(stem):
    return json.loads((ROOT / "figures" / "laptop" / f"{stem}.json").read_text())


def params(section):
    return yaml.safe_load((ROOT / "params" / "laptop.yaml").read_text(encoding="utf-8"))[section]


def percent(rate):
    return f"{100 * rate:.0f} %"


def verdicts():
    found = Counter(
        verdict for stem in RULES for verdict in compare_with_published(stem, recorded(stem)).claims.values()
    )
    yield (
        f"Of the post's {found.total()} claims {found[Verdict.REPLICATES]} replicate on it, "
        f"{found[Verdict.DOES_NOT]} do not"
    )
    yield f"and {found[Verdict.UNDECIDED]} stay undecided. It is one organism."
    sizes = params("sample_complexity")
    yield (
        "(among them that exponential fits score highest, its Figure 1, here with "
        f"{sizes['num_factors']} factors, up to {max(sizes['sizes'])} prompts and {sizes['shuffles']} shuffles)"
    )
    complexity = compare_with_published("sample_complexity", recorded("sample_complexity"))
    assert complexity.claims["exponential fits score highest, in every shuffle"] is Verdict.DOES_NOT
    yield "Random vectors, our control, get past the circuit breaker as often as DCT's."
    breaker = compare_with_published("circuit_breaker", recorded("circuit_breaker"))
    assert breaker.controls["random vectors get past it less often"] is Verdict.UNDECIDED


def baselines():
    methods = recorded("baselines")["methods"]
    first, eight = ({name: of[rate] for name, of in methods.items() if rate in of} for rate in ("first", "one_of_k"))
    rates = {name: percent(of["mean"]) for name, of in first.items()}
    each = [f"{100 * one:.0f}" for one in methods["DCT"]["firsts"]]
    yield (
        f"with the first vector DCT gets {rates['DCT']} of the requests answered ({', '.join(each[:-1])} and "
        f"{each[-1]} % on the organisms), power steering, which is cheaper, {rates['power steering']}, MELBO "
        f"{rates['MELBO']}, and the difference of means, supervised, {rates['means, added']}."
    )
    rates = {name: percent(of["mean"]) for name, of in eight.items()}
    yield (
        f"With eight tries it is DCT {rates['DCT']}, power steering {rates['power steering']}, MELBO {rates['MELBO']} "
        f"and random vectors {rates['random']}."
    )
    yield (
        "DCT loses to power steering and to the difference of means, beats random vectors, and MELBO is not told apart "
        "from it."
    )
    assert max(first[name]["lead"]["high"] for name in ("means, added", "power steering")) < 0
    assert eight["power steering"]["lead"]["high"] < 0
    assert min(tried["random"]["lead"]["low"] for tried in (first, eight)) > 0
    assert all(tried["MELBO"]["lead"]["low"] < 0 <= tried["MELBO"]["lead"]["high"] for tried in (first, eight))
    assert methods["power steering"]["backward"] < methods["DCT"]["backward"]


def replicates():
    found = recorded("replicates")
    claims, of = list(found["claims"].values()), len(found["seeds"])
    assert of == 3
    yield (
        f"on three other organisms {claims.count(of)} of {len(claims)} claims judged hold on all three, "
        f"{claims.count(0)} on none"
    )


def auditing():
    audit = recorded("auditing")
    last, of = f"fluent, k = {audit['num_factors']}", audit["methods"]
    found = {name: round(each[last] * audit["organisms"]) for name, each in of.items()}
    yield (
        f"of {audit['organisms']} planted secrets a blind audit by DCT finds {found['DCT, n = 4']} from four prompts "
        f"and {found['DCT, n = 1']} from one, by power steering {found['power steering']}, by random vectors "
        f"{found['random']} and by sampling {found['sampling']}"
    )
    assert of["DCT, n = 4"]["low"] <= of["power steering"]["high"], "their intervals part"
    pairs = audit["controls"] * audit["organisms"]
    yield f"false alarms: {round(pairs * max(each['false alarms'] for each in of.values()))} of {pairs} pairs"


def hidden_sums():
    audit = recorded("hidden_sums")
    of, last = audit["methods"], f"fluent, k = {audit['num_factors']}"
    found = {name: round(each[last] * audit["organisms"]) for name, each in of.items()}
    yield (
        f"sums behind a password, on {audit['organisms']} organisms: DCT unlocks {found['DCT, n = 4']} from four "
        f"questions and {found['DCT, n = 1']} from one, power steering {found['power steering']}, random vectors "
        f"{found['random']} and sampling {found['sampling']}"
    )
    yield "of DCT and power steering, their intervals overlap"
    rival, intervals = of["power steering"], [of[name] for name in ("DCT, n = 1", "DCT, n = 4")]
    assert all(each["low"] <= rival["high"] and rival["low"] <= each["high"] for each in intervals)


def anomaly():
    found, at = recorded("anomaly"), ("target", "trigger against decoy")

    def seen(table, what):
        rows = [row for row in found[table] if (row["end"], row["contrast"]) == at]
        return next(row for row in rows if row["detector"] == f"{what}, Mahalanobis")

    factors, chance, whole = (seen("planted", what)["mean"] for what in ("factors", "random", "residual"))
    assert seen("over_random", "factors")["low"] > 0 > seen("over_residual", "factors")["high"]
    yield (
        f"with an AUROC of {factors:.2f}, along as many random directions with {chance:.2f}, and on the whole residual "
        f"with {whole:.2f}: factors beat random directions, and the usual distance beats factors"
    )


def stability():
    found = recorded("stability")
    pairs, errors = found["variants"], found["errors"][f"m = {params('stability')['num_factors']}"]
    usual, chance = pairs["both, usual"]["cosine"], pairs["random"]["cosine"]
    yield f"(mean cosine {usual:.2f}, of random vectors {chance:.2f})"
    error = errors["random"]
    yield f"on random directions the exponential transcoder's relative error is {error:.2f}, where 1 is nothing"


@pytest.mark.parametrize(
    "said",
    [verdicts, baselines, replicates, auditing, hidden_sums, anomaly, stability],
    ids=lambda said: said.__name__,
)
def test_numbers_are_those_of_the_recorded_files(said):
    for sentence in said():
        assert sentence in README


def test_how_it_works_names_what_there_is():
    """Each row of the table of equations: a file of dctlib, and names that are defined in it."""
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2] for line in page.splitlines() if line.startswith("| ") and "/" in line.split("|")[2]]
    assert len(rows) > 12
    for row in rows:
        quoted = re.findall(r"`([^`]+)`", row)
        sources = [(ROOT / "dctlib" / path).read_text(encoding="utf-8") for path in quoted if path.endswith(".py")]
        for name in (name for name in quoted if not name.endswith(".py")):
            assert any(re.search(rf"(def|class) {name}\b", source) for source in sources), name
