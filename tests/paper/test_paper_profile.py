"""The paper profile runs end to end, on stand-ins for its models."""

import pytest
import yaml
from paper_profile import NAMING_A_MODEL, PAPER_MODELS, run_stage, stages

from dctlib._io import ROOT


@pytest.mark.parametrize("stem", stages("dvc.yaml"))
def test_every_notebook_runs_under_the_paper_profile(paper_root, stem, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run_stage(paper_root, stem)


def test_every_model_of_the_paper_has_a_stand_in_and_nothing_is_trained():
    paper = yaml.safe_load((ROOT / "params" / "paper.yaml").read_text())
    named = {str(section.get(key)) for section in paper.values() for key in NAMING_A_MODEL if section.get(key)}
    named |= {name for section in paper.values() for name in section.get("models", [])}
    named = {name.partition("@")[0] for name in named} - {"smollm2-135m-instruct"}
    named = {name for name in named if not name.startswith("models/")}  # made by another stage
    assert named == set(PAPER_MODELS)
    assert paper["organisms"]["kinds"] == []
    assert paper["rerouted"]["base"] is paper["locked"]["base"] is None
