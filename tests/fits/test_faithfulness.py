import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import unit_rows

from dctlib import FunctionMap, Transcoder, fit_exponential, fit_linear, fit_quadratic
from dctlib.fits.compare import (
    cosine_clusters,
    hessian_error,
    median_errors,
    merge_factors,
    probe_directions,
    reconstruction_error,
)
from dctlib.maps.nonlinearity import Activation
from dctlib.maps.synthetic import synthetic_map

D = 24


def transcoder(U, V, alpha, activation: Activation = "exponential", input_scale=1.0):
    nothing = torch.zeros(0)
    return Transcoder(U, V, alpha, activation, input_scale, None, None, nothing, nothing, 0.0)


def truth(planted, activation, input_scale=1.0):
    return transcoder(planted.U, planted.V, planted.alpha, activation, input_scale)


@pytest.mark.parametrize("activation", ["linear", "quadratic", "exponential"])
@pytest.mark.parametrize("R", [0.5, 1.0, 4.0])
def test_the_planted_factors_reconstruct_their_map_at_every_scale(activation, R):
    planted = synthetic_map(5, D, activation=activation, dtype=torch.float64)
    dct = truth(planted, activation)
    for directions in probe_directions(dct, count=6).values():
        error = reconstruction_error(planted.cmap, dct, directions, input_scale=R)
        assert error.shape == (6,)
        assert error.max() < 1e-12


def test_an_exponential_transcoder_is_read_at_its_own_scale():
    planted = synthetic_map(5, D, dtype=torch.float64)
    V, U, alpha = planted.V, planted.U, planted.alpha
    narrow = FunctionMap(lambda t: torch.expm1(t @ V.T / 3) * alpha @ U, d_source=D, d_target=D, dtype=torch.float64)
    dct, directions = truth(planted, "exponential", input_scale=3.0), unit_rows(4, D)
    for R in (1.5, 3.0):
        assert reconstruction_error(narrow, dct, directions, input_scale=R).max() < 1e-12
    assert reconstruction_error(planted.cmap, dct, V, input_scale=3.0).min() > 0.5


def test_half_of_every_weight_leaves_half_of_the_change():
    planted = synthetic_map(5, D, dtype=torch.float64)
    half = transcoder(planted.U, planted.V, planted.alpha / 2)
    error = reconstruction_error(planted.cmap, half, unit_rows(4, D), input_scale=2.0)
    torch.testing.assert_close(error, torch.full((4,), 0.5, dtype=torch.float64))


def test_each_activation_reconstructs_its_own_kind_of_map():
    def error(fit, activation, **options):
        planted = synthetic_map(3, D, activation=activation, dtype=torch.float64)
        dct = fit(planted.cmap, num_factors=3, progress=False, **options)
        return reconstruction_error(planted.cmap, dct, planted.V, input_scale=2.0).mean()

    iterations = {"iterations": 60, "projections": 3}
    assert error(fit_linear, "linear") < 1e-6
    assert error(fit_quadratic, "quadratic", **iterations) < 0.1
    assert error(fit_exponential, "exponential", input_scale=2.0, **iterations) < 0.5
    assert error(fit_linear, "quadratic", projections=3) > 0.5


def test_probes_are_unit_and_of_the_kind_that_they_say():
    dct = truth(synthetic_map(4, D, dtype=torch.float64), "exponential")
    found = probe_directions(dct, count=50, seed=3)
    assert list(found) == ["random", "factors", "mixed"]
    for rows in found.values():
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(50, dtype=torch.float64))
    cosine = {kind: (rows @ dct.V.T).sort(dim=1, descending=True).values for kind, rows in found.items()}
    assert cosine["factors"][:, 0].min() > 1 - 1e-12
    assert (cosine["mixed"][:, 0] - cosine["mixed"][:, 1]).abs().max() < 1e-12  # equally near two
    assert cosine["mixed"][:, 0].max() < 1 - 1e-3
    assert cosine["random"][:, 0].mean() < 0.5
    assert torch.equal(found["mixed"], probe_directions(dct, count=50, seed=3)["mixed"])
    assert not torch.equal(found["random"], probe_directions(dct, count=50, seed=4)["random"])


@pytest.mark.parametrize("activation", ["quadratic", "exponential"])
def test_the_hessian_of_the_planted_factors_is_the_maps(activation):
    planted = synthetic_map(4, D, activation=activation, linear=1.0, dtype=torch.float64)
    v, w = unit_rows(3, D), unit_rows(3, D, seed=1)
    assert hessian_error(planted.cmap, truth(planted, activation), v, w).max() < 1e-12
    half = transcoder(planted.U, planted.V, planted.alpha / 2, activation)
    torch.testing.assert_close(hessian_error(planted.cmap, half, v, w), torch.full((3,), 0.5, dtype=torch.float64))
    flat = truth(planted, "linear")
    torch.testing.assert_close(hessian_error(planted.cmap, flat, v, w), torch.ones(3, dtype=torch.float64))


def test_the_hessian_is_compared_in_the_maps_units():
    planted = synthetic_map(4, D, dtype=torch.float64)
    V, U, alpha = planted.V, planted.U, planted.alpha
    narrow = FunctionMap(lambda t: torch.expm1(t @ V.T / 3) * alpha @ U, d_source=D, d_target=D, dtype=torch.float64)
    v = unit_rows(2, D)
    assert hessian_error(narrow, truth(planted, "exponential", input_scale=3.0), v, v).max() < 1e-12


def test_the_medians_are_those_of_the_probes():
    planted = synthetic_map(4, D, dtype=torch.float64)
    half = transcoder(planted.U, planted.V, planted.alpha / 2, "exponential")
    found = median_errors(planted.cmap, half, input_scale=1.0, count=9, seed=2)
    assert [*found] == ["random", "factors", "mixed", "Hessian, random", "Hessian, factors"]
    assert found == pytest.approx(dict.fromkeys(found, 0.5))
    wrong = transcoder(planted.U, planted.V.roll(1, 0), planted.alpha, "exponential")
    found = median_errors(planted.cmap, wrong, input_scale=2.0, count=9, seed=2)
    along = probe_directions(wrong, count=9, seed=2)
    for kind, rows in along.items():
        assert found[kind] == reconstruction_error(planted.cmap, wrong, rows, input_scale=2.0).median()
    assert found["Hessian, factors"] == hessian_error(planted.cmap, wrong, *[along["factors"][:2]] * 2).median()
    found = median_errors(planted.cmap, wrong, input_scale=2.0, count=9, seed=2, along=half)
    along = probe_directions(half, count=9, seed=2)
    for kind, rows in along.items():
        assert found[kind] == reconstruction_error(planted.cmap, wrong, rows, input_scale=2.0).median()


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 5), copies=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_factors_with_one_v_merge_without_loss(m, copies, seed):
    U, V = unit_rows(m * copies, 6, seed=seed), unit_rows(m, 6, seed=seed + 1).repeat(copies, 1)
    dct = transcoder(U, V, torch.rand(m * copies, generator=torch.Generator().manual_seed(seed), dtype=U.dtype))
    small = merge_factors(dct, list(range(m)) * copies)
    assert len(small) == m
    theta = unit_rows(5, 6, seed=seed + 2)
    torch.testing.assert_close(small(theta), dct(theta))


def test_merging_costs_more_the_farther_apart_factors_are():
    planted = synthetic_map(4, D, dtype=torch.float64)
    errors = []
    for spread in (0.1, 0.5, 1.0):
        V = torch.cat([planted.V, planted.V + spread * unit_rows(4, D, seed=9)])
        V = V / V.norm(dim=1, keepdim=True)
        dct = transcoder(planted.U.repeat(2, 1), V, planted.alpha.repeat(2))
        cmap = FunctionMap(dct, d_source=D, d_target=D, dtype=torch.float64)
        groups = cosine_clusters(dct.V, cosine=0.6)
        assert groups == [0, 1, 2, 3] * 2
        errors.append(reconstruction_error(cmap, merge_factors(dct, groups), dct.V, input_scale=1.0).mean())
    assert 0 < errors[0] < errors[1] < errors[2] < 0.5


@pytest.mark.parametrize("groups", [[0, 1], [0, 2, 2, 3], [1, 1, 2, 3], [[0, 1], [2, 3]]])
def test_groups_must_number_the_factors(groups):
    dct = truth(synthetic_map(4, D, dtype=torch.float64), "exponential")
    with pytest.raises(ValueError, match="for each of 4 factors"):
        merge_factors(dct, groups)


def test_bad_scales_and_flat_directions_are_named():
    planted = synthetic_map(4, D, dtype=torch.float64)
    dct = truth(planted, "exponential")
    with pytest.raises(ValueError, match=r"input_scale=0\.0"):
        reconstruction_error(planted.cmap, dct, planted.V, input_scale=0.0)
    with pytest.raises(ValueError, match="does not change"):
        reconstruction_error(planted.cmap, dct, torch.zeros(1, D), input_scale=1.0)
    with pytest.raises(ValueError, match="count=0"):
        probe_directions(dct, count=0)
    with pytest.raises(ValueError, match="1 factors"):
        probe_directions(merge_factors(dct, [0, 0, 0, 0]), count=2)
