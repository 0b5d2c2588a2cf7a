import base64
import json
import re
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from dctlib._io import ROOT
from dctlib.paper import pipeline


@pytest.fixture
def root(tmp_path):
    """A repository with one notebook, `toy`, whose parameter is x."""
    for folder in ("notebooks", "params"):
        (tmp_path / folder).mkdir()
    (tmp_path / "params" / "run.yaml").write_text("profile: mine\n")
    (tmp_path / "params" / "mine.yaml").write_text("toy: {x: 7}\n")

    def write(code):
        cells = [new_code_cell("x = 1\nprofile = ''", metadata={"tags": ["parameters"]}), new_code_cell(code)]
        nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / "toy.ipynb")
        return tmp_path

    return write


def test_a_notebook_runs_on_a_copy_with_its_profiles_parameters(root):
    folder = root(
        "import sys; from pathlib import Path; print(x, profile, Path.cwd().name); print('bar', file=sys.stderr)"
    )
    before = (folder / "notebooks" / "toy.ipynb").read_bytes()
    path = pipeline.run_notebook("toy", "mine", folder)
    assert (folder / "notebooks" / "toy.ipynb").read_bytes() == before
    outputs = [o for cell in nbformat.read(path, as_version=4).cells for o in cell.outputs]
    assert [o.text for o in outputs] == ["7 mine notebooks\n"]
    assert "7 mine notebooks" in path.with_suffix(".html").read_text()
    assert sorted(p.name for p in path.parent.iterdir()) == ["toy.html", "toy.ipynb"]


def test_an_executed_copy_and_its_page_hold_the_saved_figure(root):
    folder = root(
        "from matplotlib.figure import Figure\n"
        "from dctlib.paper.notebook_run import NotebookRun\n"
        "NotebookRun('toy', profile).save_figure(Figure())"
    )
    path = pipeline.run_notebook("toy", "mine", folder)
    (shown,) = nbformat.read(path, as_version=4).cells[-1].outputs
    assert base64.b64decode(shown.data["image/png"]) == (folder / "figures" / "mine" / "toy.png").read_bytes()
    assert "<Figure" not in shown.data["text/plain"]
    assert re.search(r'<img[^>]+src="data:image/png;base64,', path.with_suffix(".html").read_text())
    light = folder / "writeup" / "mine" / "notebooks" / "toy.html"
    (target,) = re.findall(r'<img[^>]+src="([^"]+)"', light.read_text())
    assert (light.parent / target).resolve() == folder / "figures" / "mine" / "toy.png"


def test_a_failed_notebook_is_kept_for_reading_and_not_taken_for_a_whole_one(root):
    folder = root("raise ValueError('the layer is out of range')")
    with pytest.raises(ValueError, match=r"notebooks/toy\.ipynb: the layer is out of range"):
        pipeline.run_notebook("toy", "mine", folder)
    assert [p.name for p in (folder / "runs" / "mine").iterdir()] == ["toy.failed.ipynb"]
    root("print(x)")
    pipeline.run_notebook("toy", "mine", folder)
    assert sorted(p.name for p in (folder / "runs" / "mine").iterdir()) == ["toy.html", "toy.ipynb"]


def test_a_kernel_keeps_large_blocks_of_memory_unless_the_user_says_otherwise(root, monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    folder = root("import os; print(os.environ['MALLOC_TOP_PAD_'], os.environ['MALLOC_MMAP_THRESHOLD_'])")
    printed = nbformat.read(pipeline.run_notebook("toy", "mine", folder), as_version=4).cells[-1].outputs
    assert [o.text for o in printed] == [f"1 {2**32}\n"]


@pytest.mark.parametrize(("variable", "expected"), [(None, "host:1"), ("host:2", "host:2"), ("", "")])
def test_sweeps_find_the_cluster_of_the_params_unless_the_environment_names_one(root, monkeypatch, variable, expected):
    monkeypatch.setenv("RAY_ADDRESS", variable or "")
    if variable is None:
        monkeypatch.delenv("RAY_ADDRESS")  # also afterwards: the run leaves what it sets
    folder = root("import os; print(os.environ['RAY_ADDRESS'], 'is where')")
    (folder / "params" / "run.yaml").write_text("profile: mine\nray: host:1\n")
    printed = nbformat.read(pipeline.run_notebook("toy", "mine", folder), as_version=4).cells[-1].outputs
    assert [o.text for o in printed] == [f"{expected} is where\n"]


def test_an_unknown_notebook_is_named(root):
    with pytest.raises(ValueError, match="no section nothing"):
        pipeline.run_notebook("nothing", "mine", root("1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "training_curves", "--profile", "nowhere"], "error: no profile 'nowhere'"),
        (["run", "nowhere", "--profile", "smoke"], "error: params/smoke.yaml has no section nowhere"),
        (["writeup", "--profile", "nowhere"], "error: no profile 'nowhere'"),
        (["discover", "--model", "m", "--prompts", "benign", "--source", "5"], "error: discover: give both source"),
        (["discover", "--model", "m", "--prompts", "benign", "--name", "../m"], "error: got --name '../m'"),
    ],
)
def test_the_command_line_gives_one_message_and_an_exit_code(arguments, message):
    done = subprocess.run([sys.executable, "-m", "dctlib", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.strip().startswith(message)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_lists_the_stages():
    done = subprocess.run([sys.executable, "-m", "dctlib", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert all(command in done.stdout for command in ("assets", "run", "discover", "writeup"))


def test_metrics_in_git_are_json():
    found = list((ROOT / "figures" / "laptop").glob("*.json"))
    assert found
    for path in found:
        assert isinstance(json.loads(path.read_text()), dict)


def test_a_kernel_that_dies_is_one_message(root):
    folder = root("import os; os._exit(1)")
    with pytest.raises(ValueError, match=r"notebooks/toy\.ipynb: its kernel died"):
        pipeline.run_notebook("toy", "mine", folder)
    assert "toy.ipynb" not in {path.name for path in (folder / "runs" / "mine").iterdir()}
