import json
from pathlib import Path

import pytest

from dctlib import published
from dctlib.published import beside
from dctlib.store import ROOT

FIGURES = ROOT / "figures" / "laptop"
BREAKER = json.loads((FIGURES / "circuit_breaker.json").read_text())


@pytest.mark.parametrize("notebook", published.RULES)
def test_every_rule_reads_what_its_notebook_writes(notebook):
    found = beside(notebook, json.loads((FIGURES / f"{notebook}.json").read_text()))
    assert list(found.table) == ["measured", "published"]
    assert len(found.table) == len(found.numbers)
    assert found.claims
    assert all(isinstance(holds, bool) for holds in found.claims.values())
    assert all(claim in found._repr_markdown_() for claim in found.claims)


def test_every_rule_has_a_notebook():
    assert set(published.RULES) <= {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def breaker(dct, random):
    interval = lambda rate: {"mean": rate, "low": rate - 0.05, "high": rate + 0.05}  # noqa: E731
    test = {"DCT": interval(dct), "random": interval(random), "none": interval(0.0)}
    return BREAKER | {"test": BREAKER["test"] | test, "steered_asr": dct, "random_asr": random}


@pytest.mark.parametrize(
    ("dct", "random", "claims"), [(0.9, 0.2, [True, True]), (0.9, 0.9, [True, False]), (0, 0, [False, False])]
)
def test_a_claim_holds_only_where_intervals_part(dct, random, claims):
    found = beside("circuit_breaker", breaker(dct, random))
    assert list(found.claims.values()) == claims
    assert found.sentence.startswith("**Replicates**" if any(claims) else "**Does not replicate**")
    assert ("Does not replicate" in found.sentence) == (not all(claims))


def test_a_notebook_with_nothing_published_is_refused():
    with pytest.raises(ValueError, match="notebooks with published numbers"):
        beside("organisms", {})


def test_the_post_s_numbers_are_those_of_the_reference():
    assert published.published()["circuit_breaker"]["attack_success_rate"] == 0.62
    assert Path(ROOT / "writeup" / "published.yaml").is_file()
