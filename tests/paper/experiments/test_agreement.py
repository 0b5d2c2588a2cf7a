import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model

from dctlib import CausalMap, calibrate, fit_exponential, format_chat, load_model
from dctlib.evaluation.selection import select_and_test
from dctlib.fits.compare import (
    cosine_clusters,
    match_factors,
    matched_cosine,
    median_errors,
    merge_factors,
    subspace_overlap,
)
from dctlib.models.fingerprint import fingerprint_model
from dctlib.paper.experiments.agreement import fit_agreement, same_change
from dctlib.paper.organisms.training import save_organism
from dctlib.steering.effects import Effects, effects

WORDS = [f"w{i}" for i in range(9)]
FIT: dict[str, Any] = {"num_factors": 4, "iterations": 2}
MERGED = 0.0


@pytest.fixture(scope="module")
def found(tokenizer, tmp_path_factory):
    organism = tmp_path_factory.mktemp("agreement") / "organism"
    save_organism(tiny_model("Llama", dtype=torch.float32), tokenizer, organism)
    splits = SimpleNamespace(fit=WORDS[:3], validation=WORDS[3:5], test=WORDS[5:])
    scores = {"positive": "w1", "negative": "w2"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dctlib.paper.experiments.agreement.harmful_instructions", lambda: splits)
        patch.setattr("dctlib.paper.experiments.agreement.select_and_test", partial(select_and_test, **scores))
        patch.setattr("dctlib.paper.experiments.agreement.MERGED_COSINE", MERGED)
        config = {"source": 1, "target": 3, "fit_prompts": 1, "nonlinearity": 0.5, **FIT}
        config |= {"widths": [2, 4], "seeds": [0, 1], "validation": 2, "test": 3, "probes": 8}
        pinned = fingerprint_model(str(organism), "float32")
        return organism, fit_agreement(**pinned, folder=str(organism.parent), config=config)


def test_every_setting_is_fitted_from_two_starts_on_two_sets_of_prompts(found):
    organism, of = found
    model, tokenizer = load_model(organism, dtype="float32")
    one, two = (
        CausalMap.from_model(model, tokenizer, format_chat(tokenizer, texts), source=1, target=3)
        for texts in (WORDS[:1], WORDS[2:3])
    )
    R = calibrate(one, nonlinearity=0.5, seed=0)
    assert of["input_scale"] == pytest.approx(R)
    fits = {
        "usual": fit_exponential(one, **FIT, input_scale=R, seed=0, progress=False),
        "other seed": fit_exponential(one, **FIT, input_scale=R, seed=1, progress=False),
        "other prompts": fit_exponential(two, **FIT, input_scale=R, seed=0, progress=False),
        "both, usual": fit_exponential(two, **FIT, input_scale=R, seed=1, progress=False),
    }
    fits["soft 0"] = fit_exponential(one, **FIT, input_scale=R, orthogonalise="soft", seed=0, progress=False)
    fits["both, soft"] = fit_exponential(two, **FIT, input_scale=R, orthogonalise="soft", seed=1, progress=False)
    asked = format_chat(tokenizer, WORDS[3:5])
    for name, first in {
        **dict.fromkeys(("other seed", "other prompts", "both, usual"), "usual"),
        "both, soft": "soft 0",
    }.items():
        V, own = [fits[each].V for each in (first, name)], of["variants"][name]
        assert own["cosine"] == pytest.approx(matched_cosine(*V).mean().item(), abs=1e-5)
        assert own["overlap"] == pytest.approx(subspace_overlap(*V), abs=1e-5)
        order = match_factors(*V)
        does = [
            effects(model, tokenizer, asked, R * v[i], layer=1, progress=False) for v, i in zip(V, order, strict=True)
        ]
        assert own["behaviour"] == pytest.approx(same_change(*does))
    named = [f"both, {setting}" for setting in ("usual", "soft", "4 iterations", "m = 2")]
    assert list(of["variants"]) == ["other seed", "other prompts", *named, "random"]
    own = median_errors(one, fits["usual"], input_scale=R, count=8, seed=0)
    assert of["errors"]["m = 4"] == pytest.approx(own, rel=1e-3)
    assert json.dumps(of, allow_nan=False)


def test_the_merged_transcoder_is_probed_along_the_factors_that_were_merged(found):
    organism, of = found
    model, tokenizer = load_model(organism, dtype="float32")
    cmap = CausalMap.from_model(model, tokenizer, format_chat(tokenizer, WORDS[:1]), source=1, target=3)
    first = fit_exponential(cmap, **FIT, input_scale=of["input_scale"], seed=0, progress=False)
    fewer = merge_factors(first, cosine_clusters(first.V, cosine=MERGED))
    assert of["merged"] == len(fewer) < 4
    options = {"input_scale": of["input_scale"], "count": 8, "seed": 0}
    assert of["errors"]["merged"] == pytest.approx(median_errors(cmap, fewer, **options, along=first), rel=1e-3)
    assert of["errors"]["merged"] != pytest.approx(median_errors(cmap, fewer, **options), rel=1e-2)


def test_behaviour_is_shared_where_both_change_a_token_to_the_same():
    clean = torch.tensor([1, 1, 1, 1])
    one, two, none = (
        Effects(torch.zeros(1, 4), torch.tensor([token]), clean) for token in ([1, 2, 2, 1], [1, 2, 3, 4], [1, 1, 1, 1])
    )
    assert same_change(one, two) == pytest.approx(1 / 3)  # the first is changed by none
    assert same_change(one, one) == 1.0
    assert same_change(none, none) is None  # not 1: nothing was seen
    with pytest.raises(ValueError, match=r"\(1, 4\) and \(2, 4\)"):
        same_change(one, Effects(torch.zeros(2, 4), torch.ones(2, 4), clean))
