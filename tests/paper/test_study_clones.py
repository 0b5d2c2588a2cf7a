"""One small figure of the study from end to end: computed in one clone, drawn in another that has no model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from dctlib._io import ROOT

TASK = """
from dctlib._io import ROOT
from dctlib.runs.cache import task

@task(version=1)
def refusal_rate(seed):
    if seed == 2:
        assert (ROOT / "third").exists()
    return {"rate": float((ROOT / "models" / "toy.txt").read_text()) * seed}

def refusal_settings(seeds):
    return [{"seed": seed} for seed in seeds]
"""

STAGE = """
from dctlib.paper.experiments.toy import refusal_rate, refusal_settings
STAGES["toy"] = lambda seeds: [(refusal_rate, setting) for setting in refusal_settings(seeds)]
"""

NOTEBOOK = """
from matplotlib.figure import Figure
from dctlib.paper.experiments.toy import refusal_rate, refusal_settings
from dctlib.paper.notebook_run import NotebookRun
stage = NotebookRun("toy", profile)
rates = [result["rate"] for result in stage.record(refusal_rate, refusal_settings(seeds))]
stage.save_results({"rates": rates})
figure = Figure()
figure.add_subplot().plot(seeds, rates)
stage.save_figure(figure)
"""


def run(folder, *command):
    """Run a command in a clone, with the clone's own dctlib."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "HOME": str(folder.parent)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def git(folder, *command):
    done = run(folder, "git", "-c", "user.name=a", "-c", "user.email=a@b", *command)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def computing(tmp_path):
    """A repository with this library, one notebook, `toy`, and its model."""
    root = tmp_path / "computing"
    shutil.copytree(ROOT / "dctlib", root / "dctlib", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("notebooks", "params", "study", "models"):
        (root / folder).mkdir()
    for name in (".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    (root / "models" / "toy.txt").write_text("0.25")
    (root / "dctlib" / "paper" / "experiments" / "toy.py").write_text(TASK)
    with open(root / "dctlib" / "paper" / "study.py", "a") as file:
        file.write(STAGE)
    parameters = new_code_cell("profile = 'smoke'\nseeds = [1]", metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[parameters, new_code_cell(NOTEBOOK)]), root / "notebooks" / "toy.ipynb")
    (root / "params" / "run.yaml").write_text("profile: laptop\n")
    for profile, seeds in (("study", [1, 2, 3]), ("laptop", [1])):
        (root / "params" / f"{profile}.yaml").write_text(yaml.safe_dump({"toy": {"seeds": seeds}}))
    stage = yaml.safe_load((ROOT / "study" / "dvc.yaml").read_text())["stages"]["real_models"]
    pipeline = yaml.safe_dump({"stages": {"toy": stage}}).replace("real_models", "toy")
    (root / "study" / "dvc.yaml").write_text(pipeline)
    git(root, "init", "--quiet")
    return root


def test_a_figure_is_computed_in_one_clone_and_drawn_in_another(computing):
    done = run(computing, sys.executable, "-m", "dctlib", "study")
    assert "2 of 3 cells are recorded, 1 remain." in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: 1 cells failed, the last one with toy: refusal_rate(")
    (computing / "third").touch()
    done = run(computing, sys.executable, "-m", "dctlib", "study", "--minutes", "5")
    assert "3 of 3 cells are recorded, 0 remain." in done.stdout
    git(computing, "add", ".")
    git(computing, "commit", "--quiet", "--message", "Record the cells of toy")

    drawing = computing.parent / "drawing"
    git(computing, "clone", "--quiet", ".", str(drawing))
    assert not (drawing / "models").exists()
    assert len(list((drawing / "records" / "study" / "toy").iterdir())) == 3
    done = run(drawing, sys.executable, "-m", "dvc", "repro", "study/dvc.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((drawing / "figures" / "study" / "toy.json").read_text())["rates"] == [0.25, 0.5, 0.75]
    assert {path.suffix for path in (drawing / "figures" / "study").glob("toy.*")} == {".json", ".png", ".svg"}
    assert "up to date" in run(drawing, sys.executable, "-m", "dvc", "repro", "study/dvc.yaml").stdout

    next((drawing / "records" / "study" / "toy").iterdir()).unlink()
    done = run(drawing, sys.executable, "-m", "dctlib", "run", "toy", "--profile", "study")
    assert "error: notebooks/toy.ipynb: 1 of 3 cells of refusal_rate have no record in toy" in done.stderr
    assert "make study" in done.stderr

    done = run(computing, sys.executable, "-m", "dctlib", "run", "toy", "--profile", "laptop")
    assert done.returncode == 0, done.stderr  # other profiles compute their cells where they draw them
    assert json.loads((computing / "figures" / "laptop" / "toy.json").read_text())["rates"] == [0.25]
