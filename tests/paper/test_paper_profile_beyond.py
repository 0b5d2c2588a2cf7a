"""What goes past the paper runs under its profile too. For the night: nbval runs these notebooks in CI."""

import pytest
from paper_profile import run_stage, stages

from dctlib._io import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("stem", stages("beyond/dvc.yaml"))
def test_every_notebook_runs_under_the_paper_profile(paper_root, stem, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run_stage(paper_root, stem)
