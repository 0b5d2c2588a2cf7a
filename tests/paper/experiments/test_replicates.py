from typing import Any

import pytest
import torch
from tiny import tiny_model

from dctlib import CausalMap, calibrate, fit_exponential, format_chat, load_model, score_vectors
from dctlib.evaluation.instructions import Split
from dctlib.models.fingerprint import fingerprint_model
from dctlib.paper.claims import compare_with_published
from dctlib.paper.experiments import replicates
from dctlib.paper.experiments.aggregates import ablate_each, add_each
from dctlib.paper.experiments.replicates import replicate_on_organism
from dctlib.runs.sweep import run_sweep
from dctlib.steering.scoring import score_each

WORDS = [f"w{i} w{i + 1} w{i + 2}" for i in range(20)]
HARMFUL, BENIGN = Split(WORDS[:6], WORDS[6:8], WORDS[8:10], WORDS[10:13]), Split(WORDS[13:17], [], [], WORDS[17:])
CONFIG: dict[str, Any] = {
    "least": 0.0,
    "source": 1,
    "target": 3,
    "nonlinearity": 0.5,
    "iterations": 2,
    "fit_prompts": 2,
    "num_factors": 4,
    "validation": 2,
    "test": 3,
    "ablated": 2,
    "threshold": -100.0,
}


@pytest.fixture
def organism(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(replicates, "harmful_instructions", lambda: HARMFUL)
    monkeypatch.setattr(replicates, "benign_split", lambda: BENIGN)
    tiny_model("Llama", dtype=torch.float32).save_pretrained(tmp_path / "1")
    tokenizer.save_pretrained(tmp_path / "1")
    return fingerprint_model(str(tmp_path / "1"), "float32")


def test_it_does_with_another_organism_what_the_notebooks_do_with_the_first(organism, tmp_path):
    settings = [{**organism, "seed": seed, "config": CONFIG} for seed in (1, 2)]
    one, two = run_sweep(replicate_on_organism, settings, folder=tmp_path / "found", progress=False)
    assert one["training_curves"] != two["training_curves"]
    model, tokenizer = load_model(tmp_path / "1", dtype="float32")
    parts: dict[str, Any] = {
        part: format_chat(tokenizer, getattr(HARMFUL, part)) for part in ("fit", "validation", "test")
    }
    cmap = CausalMap.from_model(model, tokenizer, parts.pop("fit"), source=1, target=3)
    dct = fit_exponential(cmap, num_factors=4, input_scale=calibrate(cmap, seed=1), iterations=2, seed=1)
    assert one["training_curves"]["width"]["4"]["objective"] == dct.objective.tolist()
    ranked = score_vectors(model, tokenizer, parts["validation"], dct.steering_vectors(), layer=1)
    numbers = ranked.argsort(descending=True).tolist()  # all qualify
    added = add_each(model, tokenizer, dct.V[numbers], layer=1, norm=dct.input_scale, **parts)
    assert one["multiplicity"].items() >= vars(added).items()
    ablated = ablate_each(model, tokenizer, dct.U[numbers], test=parts["test"][:2])
    assert one["ablation"]["target"] == vars(ablated)
    best = dct.steering_vectors()[
        [score_each(model, tokenizer, parts["validation"], dct.steering_vectors(), layer=1).best()]
    ]
    said = score_each(model, tokenizer, parts["test"], best, layer=1).is_top1
    assert one["training_curves"]["sure_rate"]["DCT"] == pytest.approx(said.double().mean().item())
    for stem in ("training_curves", "multiplicity", "ablation"):
        assert compare_with_published(stem, one[stem]).claims


def test_an_organism_that_falls_short_is_not_fitted(organism):
    with pytest.raises(ValueError, match="the refusal-1 organism falls short"):
        replicate_on_organism(**organism, config={**CONFIG, "least": 1.0}, seed=1)
