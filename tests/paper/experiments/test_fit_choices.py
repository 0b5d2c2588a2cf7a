from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dctlib import CausalMap, calibrate, fit_exponential
from dctlib.paper.experiments.fit_choices import FitConfig, fit_each_config, vary_one_choice

USUAL = FitConfig(prompts="averaged", nonlinearity=0.5, horizon=2, positions=3)
SETTINGS = {"source": 1, "num_factors": 3, "iterations": 2, "seed": 4}


@given(
    nonlinearity=st.lists(st.sampled_from([0.25, 1.0, 2.0]), unique=True),
    horizon=st.lists(st.integers(3, 9), unique=True),
    positions=st.lists(st.integers(4, 9), unique=True),
)
def test_every_variant_differs_from_the_reference_in_one_thing(nonlinearity, horizon, positions):
    others = {"nonlinearity": nonlinearity, "horizon": horizon, "positions": positions, "prompts": ["concatenated"]}
    variants = vary_one_choice(USUAL, others)
    assert next(iter(variants.values())) == USUAL
    assert len(variants) == 2 + len(nonlinearity) + len(horizon) + len(positions)
    for (name, value), of in list(variants.items())[1:]:
        assert {key for key in vars(of) if getattr(of, key) != getattr(USUAL, key)} == {name}
        assert getattr(of, name) == value


def test_a_choice_that_there_is_not_is_named():
    with pytest.raises(ValueError, match=r"\['depth'\], expected some of \['prompts', 'nonlinearity'"):
        vary_one_choice(USUAL, {"depth": [1]})


def test_each_is_the_fit_of_its_map_at_its_scale(llama, tokenizer, texts, tmp_path):
    variants = vary_one_choice(USUAL, {"prompts": ["concatenated"], "nonlinearity": [0.25], "horizon": [3]})
    found = fit_each_config(tmp_path, llama, tokenizer, texts, variants, **SETTINGS)
    reference, concatenated, gentle, deep, random = found.values()
    kinds: list[Any] = [(reference, "mean", 3, 0.5), (concatenated, "concatenate", 3, 0.5)]
    kinds += [(gentle, "mean", 3, 0.25), (deep, "mean", 4, 0.5)]
    for one, reduction, target, nonlinearity in kinds:
        assert one
        cmap = CausalMap.from_model(llama, tokenizer, texts, source=1, target=target, reduction=reduction)
        assert one.input_scale == calibrate(cmap, nonlinearity=nonlinearity, seed=4)
        fit = {"num_factors": 3, "iterations": 2, "seed": 4, "progress": False}
        dct = fit_exponential(cmap, input_scale=one.input_scale, **fit)
        torch.testing.assert_close(one.vectors, dct.steering_vectors())
    assert reference and gentle and gentle.input_scale < reference.input_scale
    assert random and random.vectors.shape == reference.vectors.shape
    torch.testing.assert_close(random.vectors.norm(dim=1), torch.full((3,), reference.input_scale))
    assert [choice for choice, _ in found] == ["reference", "prompts", "nonlinearity", "horizon", "random"]


def test_what_has_no_scale_is_none_but_the_reference_must_have_one(llama, tokenizer, texts, tmp_path):
    found = fit_each_config(
        tmp_path, llama, tokenizer, texts, vary_one_choice(USUAL, {"nonlinearity": [1e6]}), **SETTINGS
    )
    assert [one is None for one in found.values()] == [False, True, False]
    with pytest.raises(ValueError, match="no scale R"):
        fit_each_config(
            tmp_path, llama, tokenizer, texts, {("reference", ""): FitConfig("averaged", 1e6, 2, 3)}, **SETTINGS
        )


def test_a_slice_that_does_not_fit_is_no_missing_scale(llama, tokenizer, texts, tmp_path):
    with pytest.raises(ValueError, match="ends at layer 10, expected at most 4"):
        fit_each_config(tmp_path, llama, tokenizer, texts, vary_one_choice(USUAL, {"horizon": [9]}), **SETTINGS)
    assert not list(tmp_path.iterdir())  # said before the first fit
    with pytest.raises(ValueError, match="fewer than positions=5"):
        fit_each_config(tmp_path, llama, tokenizer, texts, vary_one_choice(USUAL, {"positions": [5]}), **SETTINGS)


def test_a_second_run_reads_the_fits(llama, tokenizer, texts, tmp_path):
    variants = vary_one_choice(USUAL, {"prompts": ["concatenated"]})
    one, two = (fit_each_config(tmp_path, llama, tokenizer, texts, variants, **SETTINGS) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 2
    for a, b in zip(one.values(), two.values(), strict=True):
        assert a and b and a.seconds == b.seconds and torch.equal(a.vectors, b.vectors)
