import json
import re
import shutil
import subprocess
import time
from itertools import pairwise

import pytest

from dctlib._io import ROOT
from dctlib.paper.document import _link_notebooks, _revision, markdown_text, number, percent, row, write_report


@pytest.fixture
def root(tmp_path):
    """A repository with the committed profiles and a writeup of one number."""
    for folder in ("notebooks", "params", "writeup"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("smoke"))
    (tmp_path / "figures" / "smoke").mkdir(parents=True)
    (tmp_path / "figures" / "smoke" / "toy.json").write_text(json.dumps({"score": -7.25, "said": "<script>*x*"}))
    (tmp_path / "writeup" / "paper.md").write_text(
        "---\ntitle: Toy\n---\n\n# Result {#sec}\n\n$\\theta^2$: {{ toy.score | number }}, published "
        "{{ published.synthetic.jacobian_init_10_iterations.mean_max_cosine }}. {{ toy.said | text }}\n"
    )
    return tmp_path


def test_numbers_reach_html_and_pdf(root):
    html, pdf = write_report("smoke", root)
    text = html.read_text()
    assert "−7.2" in text
    assert "0.85" in text
    assert "<math" in text
    assert pdf.read_bytes().startswith(b"%PDF")
    assert sorted(path.name for path in html.parent.iterdir()) == ["paper.html", "paper.pdf"]


def test_the_same_numbers_make_the_same_bytes(root):
    first = [path.read_bytes() for path in write_report("smoke", root)]
    time.sleep(1.1)  # a date in a PDF has seconds
    assert [path.read_bytes() for path in write_report("smoke", root)] == first


def test_what_a_model_said_is_shown_not_interpreted(root):
    html, _ = write_report("smoke", root)
    assert "<script>*x*" not in html.read_text()
    assert "&lt;script&gt;*x*" in html.read_text()


def test_a_missing_number_is_an_error_and_leaves_nothing(root):
    (root / "figures" / "smoke" / "toy.json").write_text("{}")
    with pytest.raises(ValueError, match=r"needs a number that figures/smoke/ lacks"):
        write_report("smoke", root)
    assert not (root / "writeup" / "smoke").exists()


def test_another_document_is_named_for_itself(root):
    (root / "writeup" / "beyond.md").write_text("Score {{ toy.score | number }}\n")
    html, pdf = write_report("smoke", root, document="beyond")
    assert (html.name, pdf.name) == ("beyond.html", "beyond.pdf")
    assert "−7.2" in html.read_text()
    with pytest.raises(ValueError, match=r"no document 'nowhere': expected one of beyond, paper"):
        write_report("smoke", root, document="nowhere")


def test_citations_become_references_and_authors_a_byline(root):
    (root / "writeup" / "paper.md").write_text(
        "---\ntitle: Toy\nauthor: {{ authors }}\n---\n\nAs shown [@arditi2024refusal].\n\n# References\n\n"
        "::: {#refs}\n:::\n"
    )
    html, _ = write_report("smoke", root)
    text = html.read_text()
    assert "Refusal in Language Models Is Mediated by a Single Direction" in " ".join(text.split())
    assert "The dctlib authors" in text


def test_documents_cite_what_the_bibliography_holds():
    entries = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "writeup" / "references.bib").read_text(), re.MULTILINE))
    prose = [path.read_text() for path in (ROOT / "writeup").glob("*.md")]
    assert {key for text in prose for key in re.findall(r"(?<!\w)@(\w+)", text)} == entries


def test_no_heading_joins_the_line_before():
    for path in (ROOT / "writeup").glob("*.md"):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        for before, line in pairwise(lines):
            shown = re.sub(r"\{% macro .*|\{%.*?%\}", "", before).strip()
            # A tag at the end of a line swallows the line break, which matters where the line also holds text.
            assert not (line.startswith("#") and shown and before.endswith("%}")), f"{path.name}: {line}"


def test_the_revision_is_the_last_commit_of_the_sources(tmp_path):
    assert _revision(tmp_path) is None
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "run.yaml").write_text("profile: smoke\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=First"]):
        subprocess.run([*git, *command], check=True)
    first = _revision(tmp_path)
    (tmp_path / "figure.json").write_text("{}")
    for command in (["add", "."], ["commit", "--quiet", "--message=Draw"]):
        subprocess.run([*git, *command], check=True)
    assert first is not None
    assert _revision(tmp_path) == first
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", first["date"])


def test_a_row_is_found_by_its_columns():
    table = [{"end": "source", "of": 1.0}, {"end": "target", "of": 1.0}]
    assert row(table, end="target", of=1.0) is table[1]
    for columns in ({"of": 1.0}, {"end": "nowhere"}):
        with pytest.raises(ValueError, match="expected one"):
            row(table, **columns)


def test_formats():
    assert number(-7.25) == "−7.2"
    assert number(7.25, 2) == "+7.25"
    assert number(0.0) == number(-0.04) == "0.0"
    assert percent(0.935) == "94\u00a0%"
    assert markdown_text("a*b\n<c>") == r"a\*b \<c\>"


def test_a_page_that_no_run_has_left_is_linked_as_its_notebook(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "there.html").touch()
    links = "[Notebook](notebooks/there.html) and [Notebook](notebooks/missing.html)"
    expected = "[Notebook](notebooks/there.html) and [Notebook](../../notebooks/missing.ipynb)"
    assert _link_notebooks(links, tmp_path) == expected
