"""What goes past the paper runs under its profile too: a file of its own, for a test process of its own."""

import pytest
from paper_profile import paper_root, run_stage, stages

from dctlib.store import ROOT


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return paper_root(tmp_path_factory.mktemp("paper"))


@pytest.mark.parametrize("stem", stages("beyond/dvc.yaml"))
def test_every_notebook_runs_under_the_paper_profile(root, stem, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run_stage(root, stem)
