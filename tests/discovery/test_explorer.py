import json
import random
import re
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import unit_rows

import dctlib.discovery.explorer
from dctlib.discovery.completions import SteeredCompletions
from dctlib.discovery.explorer import Exploration, write_explorer
from dctlib.discovery.ranking import rank_and_cluster

HOSTILE = [
    "</script><script>window.pwned=1</script>",
    '<img src=x onerror="window.pwned=1">',
    '&<img src=x onerror="window.pwned=1">',  # an ampersand makes DataTables decode entities
    "<!--<script>window.pwned=1",
    "{{ 7 * 7 }}",
    "nul \x00 and line\u2028separators\u2029",
    "lone surrogate \ud800",
    "\u202eright to left override",
    "שלום " * 8,
    "W" * 500,
]


def exploration(k: int, n: int, *, strengths=(1.0, 0.5, 2.0), read: int | None = None, layers: int = 7, **more):
    """A run of k factors in which every text is hostile."""
    read, rows = k if read is None else read, random.Random(0)
    V, U = unit_rows(k, 24).float(), unit_rows(k, 16).float()
    measured = pd.DataFrame({"vector": range(k), "change": [rows.uniform(4, 60) for _ in range(k)]})
    measured["next"] = [HOSTILE[i % len(HOSTILE)] for i in range(k)]
    measured["score"] = [rows.gauss(-2, 6) for _ in range(k)]
    table = rank_and_cluster(measured, V, by="score")
    order = table["vector"].tolist()
    steered = {
        strength: [[f"factor {v} ×{strength:g} {HOSTILE[i % len(HOSTILE)]}" for i in range(n)] for v in order[:read]]
        for strength in strengths
    }
    completions = SteeredCompletions(
        [f"clean {HOSTILE[i % len(HOSTILE)]}" for i in range(n)], steered, [2.5] * read, [1.0] * read
    )
    settings: dict[str, Any] = {
        "title": HOSTILE[0],
        "facts": {"model": HOSTILE[1], "R": "12.4"},
        "table": table,
        "V": V[order],
        "U": U[order],
        "instructions": [f"instruction {i} {HOSTILE[i % len(HOSTILE)]}" for i in range(n)],
        "completions": completions,
        "completed": order[:read],
        "shown_characters": 200,
        "norms": torch.arange(layers) * torch.ones(k, 1),
    }
    return Exploration(**settings | more)


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(dctlib.discovery.explorer, "get_plotlyjs", lambda: "let plots;")

    def write(run: Exploration) -> str:
        write_explorer(tmp_path / "explorer.html", run)
        return (tmp_path / "explorer.html").read_text(encoding="utf-8")

    return write


def block(page: str) -> str:
    return page.split('<script type="application/json" id="data">')[1].split("</script>")[0]


def content(page: str) -> dict:
    return json.loads(block(page))


def test_texts_come_back_as_they_were_said_and_never_as_markup(page):
    run = exploration(12, len(HOSTILE))
    html = page(run)
    data = content(html)
    assert data["instructions"] == list(run.instructions)
    names = [column["name"] for column in data["columns"]]
    assert [row[names.index("next")] for row in data["rows"]] == run.table["next"].tolist()
    assert data["strengths"] == [0.5, 1, 2]
    assert data["start"] == 1
    first = data["steered"][str(run.completed[0])]
    assert first[2][1] == run.completions.steered[2.0][0][1]
    assert first[0][9] == run.completions.steered[0.5][0][9][:200] + " …"
    assert not set("<>&\0\u2028\u2029\u202e") & set(block(html))
    assert html.count("</script>") == 4
    assert "<title>&lt;/script&gt;" in html


def test_numbers_that_json_cannot_hold_are_left_blank(page):
    run = exploration(3, 1, read=1)
    table = run.table.assign(score=[float("nan"), float("inf"), 123.456789])
    data = content(page(replace(run, table=table)))
    names = [column["name"] for column in data["columns"]]
    assert [row[names.index("score")] for row in data["rows"]] == [None, None, 123.46]
    assert [row[names.index("perplexity")] for row in data["rows"]] == [2.5, None, None]
    assert "alike" not in names and "cluster" in names
    decimals = {column["name"]: column["decimals"] for column in data["columns"]}
    assert (decimals["vector"], decimals["next"], decimals["score"]) == (0, None, 0)


def test_perplexity_that_was_measured_for_all_is_shown_for_all(page):
    run = exploration(3, 1, read=1)
    data = content(page(replace(run, table=run.table.assign(perplexity=[4.0, 5.0, 6.0]))))
    names = [column["name"] for column in data["columns"]]
    assert names.count("perplexity") == 1
    assert [row[names.index("perplexity")] for row in data["rows"]] == [4, 5, 6]


def test_similar_factors_and_the_map(page):
    V = torch.tensor([[1.0, 0], [-0.8, 0.6], [0, 1], [0.6, 0.8]])
    data = content(page(exploration(4, 1, V=V, U=V.flip(0))))
    ids = [row[0] for row in data["rows"]]
    assert [(ids.index(vector), cosine) for vector, cosine in data["similar"]["v"][0]] == [(1, -0.8), (3, 0.6), (2, 0)]
    assert data["similar"]["u"][3][0] == [ids[2], -0.8]
    assert data["rows"][0][-2:] == [ids[1], -0.8]
    points = torch.tensor(data["map"]["points"])
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(V, V), atol=1e-4, rtol=0)
    assert sum(data["map"]["explained"]) == pytest.approx(1)


def test_one_factor_without_norms_that_was_not_read(page):
    data = content(page(exploration(1, 2, read=0, norms=None, hide=False)))
    assert data["similar"] == {"v": [[]], "u": [[]]}
    assert data["rows"][0][-2:] == [None, None]
    assert (data["norms"], data["steered"], data["hide"]) == (None, {}, False)
    assert data["map"]["points"] == [[0, 0]]


def test_the_policy_names_every_script_and_allows_no_other(page):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page(exploration(2, 1)))
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == rules["connect-src"] == "'none'"
    assert len(re.findall("'sha256-[^']{44}'", rules["script-src"])) == 3
    assert "unsafe" not in rules["script-src"]


def test_a_failure_leaves_the_page_that_was_there(tmp_path, monkeypatch):
    (tmp_path / "explorer.html").write_text("old")
    monkeypatch.setattr(dctlib.discovery.explorer, "_datatables", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_explorer(tmp_path / "explorer.html", exploration(2, 1))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"explorer.html": "old"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": pd.DataFrame({"score": [1.0]})}, r"table of \['score'\], expected .* vector number"),
        ({"table": pd.DataFrame({"vector": [0, 0, 1]})}, "expected .* vector number"),
        ({"V": unit_rows(4, 24)}, r"V \(4, 24\), expected \(3, …\)"),
        ({"U": torch.full((3, 16), torch.nan)}, r"U \(3, 16\), expected \(3, …\), finite"),
        ({"norms": torch.zeros(7)}, r"norms \(7,\), expected \(3, …\)"),
        ({"completed": [0, 1, 9]}, r"completed \[0, 1, 9\], expected vectors of the table"),
        ({"completed": [0, 1, 1]}, "each once"),
        ({"completed": [0]}, r"completions of \[3\] vectors, expected 1"),
        ({"instructions": ["only one"]}, r"got \[2\] completions, expected 1"),
        ({"shown_characters": 0}, "shown_characters=0, expected at least 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        exploration(3, 2, **change)
