import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, unit_rows

from dctlib import CausalMap, FunctionMap, calibrate

V, U = unit_rows(12, 8, seed=1), unit_rows(12, 8, seed=2)


def saturating(scale=1.0):
    return FunctionMap(lambda t: torch.tanh(t / scale @ V.T) @ U, d_source=8, d_target=8, dtype=torch.float64)


def nonlinearity_of(cmap, R, seed=0):
    directions = torch.randn(30, cmap.d_source, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(cmap.dtype)
    linear = R * cmap.jvp(torch.zeros_like(directions), directions)
    return ((cmap(R * directions) - linear).square().sum(1).mean() / linear.square().sum(1).mean()).sqrt().item()


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(-9, 9).map(lambda x: 10**x), wanted=st.floats(0.05, 0.9))
def test_finds_the_scale_wherever_it_lies(scale, wanted):
    cmap = saturating(scale)
    R = calibrate(cmap, nonlinearity=wanted)
    assert nonlinearity_of(cmap, R) == pytest.approx(wanted, rel=1e-3)
    assert R / scale == pytest.approx(calibrate(saturating(), nonlinearity=wanted), rel=1e-3)


@pytest.mark.parametrize("scale", [0.2164, 8.81, 22.0])
def test_the_posts_three_scales(scale):
    unit = calibrate(saturating())
    assert calibrate(saturating(scale / unit)) == pytest.approx(scale, rel=1e-3)


def test_growth_that_overflows_is_not_mistaken_for_a_root():
    cmap = FunctionMap(lambda t: torch.expm1(t @ V.float().T) @ U.float(), d_source=8, d_target=8)
    assert nonlinearity_of(cmap, calibrate(cmap)) == pytest.approx(0.5, rel=1e-2)


def test_on_a_transformer(tokenizer, texts):
    cmap = CausalMap.from_model(tiny_model("Llama"), tokenizer, texts, source=1, target=3)
    assert nonlinearity_of(cmap, calibrate(cmap)) == pytest.approx(0.5, rel=1e-3)


def test_no_scale_is_tried_twice(monkeypatch):
    tried, value = [], FunctionMap.__call__

    def noted(cmap, theta):
        tried.append(theta[0].norm().item())
        return value(cmap, theta)

    monkeypatch.setattr(FunctionMap, "__call__", noted)
    calibrate(saturating())
    assert len(tried) == len(set(tried)) > 3


def test_seeds():
    assert calibrate(saturating(), seed=1) == calibrate(saturating(), seed=1) != calibrate(saturating(), seed=2)


def test_a_linear_map_has_no_scale():
    with pytest.raises(ValueError, match="it is linear"):
        calibrate(FunctionMap(lambda t: t @ V.T @ U, d_source=8, d_target=8, dtype=torch.float64))


def test_a_constant_map_has_no_scale():
    with pytest.raises(ValueError, match="Jacobian at 0 vanishes"):
        calibrate(FunctionMap(lambda t: 0 * t, d_source=8, d_target=8))


@pytest.mark.parametrize("options", [{"nonlinearity": 0}, {"nonlinearity": float("nan")}, {"num_directions": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="expected both above 0"):
        calibrate(saturating(), **options)


def test_a_map_that_overflows_before_it_bends_has_no_scale():
    def flat_then_nothing(theta):
        return torch.where(theta.norm(dim=1, keepdim=True) < 5, theta + 0.01 * theta**2, torch.nan)

    with pytest.raises(ValueError, match=r"beyond R=5 this map is not finite"):
        calibrate(FunctionMap(flat_then_nothing, d_source=8, d_target=8))
