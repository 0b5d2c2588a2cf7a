import json
import math
import random
import re
import shlex
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import unit_rows

import dctlib.discovery.explorer
from dctlib.discovery.explorer import _ABOUT, Exploration, write_explorer
from dctlib.discovery.found import NUMBERS, FoundVectors
from dctlib.discovery.snippets import SharedPlace

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


def exploration(k: int, n: int, *, read: int | None = None, **more):
    """A run of k vectors in which every text is hostile."""
    read, rows = k if read is None else read, random.Random(0)
    V, U = unit_rows(k, 24).float(), unit_rows(k, 16).float()
    table = pd.DataFrame({"vector": range(k), "damage": [rows.uniform(4, 60) for _ in range(k)]})
    table["says"] = [HOSTILE[i % len(HOSTILE)] for i in range(k)]
    table["score"] = [rows.gauss(-2, 6) for _ in range(k)]
    table = table.sort_values("score", ascending=False)
    order = table["vector"].tolist()
    settings: dict[str, Any] = {
        "title": HOSTILE[0],
        "facts": {"model": HOSTILE[1], "R": "12.4"},
        "table": table,
        "V": V[order],
        "U": U[order],
        "map": torch.arange(2.0 * k + 2).view(k + 1, 2),
        "instructions": [f"instruction {i} {HOSTILE[i % len(HOSTILE)]}" for i in range(n)],
        "unsteered": [f"clean {HOSTILE[i % len(HOSTILE)]}" for i in range(n)],
        "completions": {v: [f"vector {v} {HOSTILE[i % len(HOSTILE)]}" for i in range(n)] for v in order[:read]},
        "shown_characters": 200,
        "snippets": {order[0]: (f"python {HOSTILE[0]}\nline 2", f"export {HOSTILE[1]}")},
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
    assert [row[names.index("says")] for row in data["rows"]] == run.table["says"].tolist()
    vector, texts = next(iter(run.completions.items()))
    first = data["steered"][str(vector)]
    assert first[1] == texts[1]
    assert first[9] == texts[9][:200] + " …"
    assert not set("<>&\0\u2028\u2029\u202e") & set(block(html))
    assert html.count("</script>") == 4
    assert "<title>&lt;/script&gt;" in html


def test_numbers_that_json_cannot_hold_are_left_blank(page):
    run = exploration(3, 1, read=1)
    table = run.table.assign(score=[float("nan"), float("inf"), 123.456789])
    data = content(page(replace(run, table=table)))
    names = [column["name"] for column in data["columns"]]
    assert [row[names.index("score")] for row in data["rows"]] == [None, None, 123.46]
    decimals = {column["name"]: column["decimals"] for column in data["columns"]}
    assert (decimals["vector"], decimals["says"], decimals["score"]) == (0, None, 0)


def found_vectors():
    """Four candidates, of which the third and the first were found, in this order, at lengths 3 and 1."""
    table = pd.DataFrame({"found": [True, True, False, False]}, index=[2, 0, 1, 3])
    table["length"] = [3.0, 1.0, 2.0, 4.0]
    for name in ["source", "says", "request"]:
        table[name] = "text"
    for name in [each for each in NUMBERS if each != "length"]:
        table[name] = 0.5
    return FoundVectors(7, 6.5, table, unit_rows(4, 8).float(), ["a"], {2: ["b"]}, False, torch.zeros(5, 2))


def of_search(**more):
    return Exploration.from_search("t", {}, found_vectors(), unit_rows(4, 6), ["ask"], shown_characters=9, **more)


def test_each_vector_that_was_found_has_code_with_its_own_place_layer_and_length():
    place = SharedPlace("vectors/it's mine", "owner/model@1", 7, {"system": "Be brief."})
    run = of_search(shared=place)
    assert list(run.snippets) == [2, 0]
    python, command = run.snippets[2]
    compile(python, "snippet", "exec")
    assert 'load_model("owner/model@1")' in python
    assert 'load_folder("vectors/it\'s mine")' in python
    assert "steer(model, layer=7, vector=shared.vectors[0]):  # at its own length, 3\n" in python
    assert "**{'system': 'Be brief.'})" in python
    assert shlex.split(command)[3:6] == ["export", "vectors/it's mine", "0"]
    python, command = run.snippets[0]
    assert "shared.vectors[1]):  # at its own length, 1\n" in python
    assert shlex.split(command)[5:] == ["1", "--to", "gguf", "--output", "vector-1.gguf"]
    assert of_search().snippets == {}


def test_every_column_of_a_search_is_explained():
    assert {"vector", "found", "source", *NUMBERS, "says"} <= set(_ABOUT)


def test_similar_vectors_by_what_steers_and_by_what_is_written(page):
    V = torch.tensor([[1.0, 0], [-0.8, 0.6], [0, 1], [0.6, 0.8]])
    data = content(page(exploration(4, 1, V=V, U=V.flip(0))))
    ids = [row[0] for row in data["rows"]]
    assert [(ids.index(vector), cosine) for vector, cosine in data["similar"]["v"][0]] == [(1, -0.8), (3, 0.6), (2, 0)]
    assert data["similar"]["u"][3][0] == [ids[2], -0.8]
    assert data["rows"][0][-2:] == [ids[1], -0.8]


def test_the_map_has_a_point_for_each_vector_that_was_read_and_for_the_unsteered_model(page):
    drawn = torch.tensor([[1.0, 2], [math.nan, math.nan], [3, 4]])
    assert content(page(exploration(2, 1, map=drawn)))["map"] == [[1, 2], [None, None], [3, 4]]
    with pytest.raises(ValueError, match=r"map of shape \(2, 2\), expected \(3, 2\)"):
        exploration(2, 1, map=drawn[:2])


def test_one_vector_that_was_not_read(page):
    data = content(page(exploration(1, 2, read=0, hide=False)))
    assert data["similar"] == {"v": [[]], "u": [[]]}
    assert data["rows"][0][-2:] == [None, None]
    assert (data["steered"], data["hide"]) == ({}, False)
    assert data["map"] == [[0, 1], [2, 3]]


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
        ({"completions": {9: ["a", "b"]}}, r"completions of \[9\], expected vectors of the table"),
        ({"completions": {0: ["a"]}}, r"got \[1, 2\] completions, expected 2"),
        ({"snippets": {9: ("a", "b")}}, r"snippets of \[9\], expected vectors of the table"),
        ({"instructions": ["only one"]}, r"got \[2\] completions, expected 1"),
        ({"shown_characters": 0}, "shown_characters=0, expected at least 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        exploration(3, 2, **change)
