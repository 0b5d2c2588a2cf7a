import json
import shutil
import time

import pytest

from dctlib._io import ROOT
from dctlib.paper.document import markdown_text, number, percent, row, write_report


@pytest.fixture
def root(tmp_path):
    """A repository with the committed profiles and a writeup of one number."""
    for folder in ("notebooks", "params", "writeup"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
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
