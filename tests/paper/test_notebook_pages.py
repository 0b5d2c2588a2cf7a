import base64
import re

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from dctlib._io import ROOT
from dctlib.paper.notebook_pages import write_page

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
TABLE = '<style scoped>p {}</style><table border="1" class="dataframe"><tr><td>a *star* $x$</td></tr></table>'


@pytest.fixture
def root(tmp_path):
    """A repository whose profile `mine` has the notebooks `second` and `first`, in this order."""
    for folder in ("notebooks", "params", "figures/mine"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "params" / "mine.yaml").write_text("second: {}\nfirst: {}\n")
    for stem in ("first", "second"):
        cells = [new_markdown_cell(f"# The {stem} question\n\nWhat is $x$?")]
        nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / f"{stem}.ipynb")
    return tmp_path


@pytest.mark.parametrize("pipeline", ["dvc.yaml", "beyond/dvc.yaml", "study/dvc.yaml"])
def test_every_stage_that_runs_a_notebook_leaves_its_page(pipeline):
    stages = yaml.safe_load((ROOT / pipeline).read_text())["stages"].values()
    commands = [re.fullmatch(r"python -m dctlib run (\w+) --profile (\S+)", stage["cmd"]) for stage in stages]
    assert any(commands)
    for stage, command in zip(stages, commands, strict=True):
        if command:
            stem, profile = command.groups()
            assert {f"writeup/{profile}/notebooks/{stem}.html": {"cache": False}} in stage["outs"]


def written(root, *outputs, prose="# Title", stem="first"):
    """The page of a notebook of some prose and one code cell with these outputs."""
    cell = new_code_cell("print('</details>')", outputs=list(outputs))
    return write_page(new_notebook(cells=[new_markdown_cell(prose), cell]), stem, "mine", root).read_text()


def shown(kind, value):
    return new_output("display_data", data={kind: value, "text/plain": "<Figure>"})


def test_a_figure_is_a_link_to_the_file_that_was_saved(root):
    (root / "figures" / "mine" / "first_curves.png").write_bytes(base64.b64decode(PIXEL))
    page = written(root, shown("image/png", f"{PIXEL[:40]}\n{PIXEL[40:]}\n"))
    (target,) = re.findall(r'<img[^>]*src="([^"]+)"', page)
    assert (root / "writeup/mine/notebooks" / target).resolve() == root / "figures/mine/first_curves.png"
    assert 'href="../../../figures/mine/first_curves.svg"' in page
    assert "data:image" not in page
    assert "Figure&gt;" not in page


def test_an_image_that_no_file_holds_stays_in_the_page(root):
    assert f'src="data:image/png;base64,{PIXEL}"' in written(root, shown("image/png", PIXEL))


def test_formulas_need_no_network_and_other_notebooks_are_pages(root):
    page = written(root, prose="# On $\\theta^2$\n\nAs in [the second](second.ipynb): $\\sum_l u_l$.")
    assert page.count("<math") == 2
    assert "$" not in re.sub(r"<annotation.*?</annotation>", "", page)
    assert 'href="second.html"' in page
    assert 'href="../../../notebooks/first.ipynb"' in page
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)


def test_code_is_folded_and_outputs_are_shown_as_they_are(root):
    hostile = "```\n</pre><script>window.pwned = 1</script> *star* \x1b[31mred\x1b[0m\n```"
    page = written(root, new_output("stream", text=hostile), shown("text/html", TABLE))
    assert re.search(r"<details class=\"code\">\s*<summary>\s*Code\s*</summary>.*?print", page, re.DOTALL)
    assert page.count("</details>") == 1
    assert "<script" not in page
    assert "&lt;script&gt;window.pwned = 1&lt;/script&gt; *star* red" in page
    assert '<table class="dataframe"><tr><td>a *star* $x$</td></tr></table>' in page
    assert "scoped" not in page


def test_markdown_that_a_cell_returns_is_a_table(root):
    page = written(root, shown("text/markdown", "| | measured |\n|:--|--:|\n| score | 0.5 |"))
    assert re.search(r"<td[^>]*>score</td>\s*<td[^>]*>0.5</td>", page)


def test_the_index_lists_the_pages_that_there_are_in_the_order_of_the_profile(root):
    index = root / "writeup/mine/notebooks/index.html"

    def listed():
        return re.findall(r'href="(\w+\.html)">([^<]+)<', index.read_text())

    written(root, stem="first")
    assert listed() == [("first.html", "The first question")]
    written(root, stem="second")
    assert listed() == [("second.html", "The second question"), ("first.html", "The first question")]


def test_the_same_run_makes_the_same_bytes(root):
    assert written(root, shown("text/html", TABLE)) == written(root, shown("text/html", TABLE))
