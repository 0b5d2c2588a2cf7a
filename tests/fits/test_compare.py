import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import unit_rows

from dctlib import FunctionMap, Transcoder, fit_exponential, fit_linear, fit_quadratic
from dctlib.fits.compare import (
    cosine_clusters,
    hessian_error,
    match_factors,
    matched_cosine,
    median_errors,
    merge_factors,
    probe_directions,
    reconstruction_error,
    recovery,
    similarity,
    subspace_overlap,
)
from dctlib.maps.nonlinearity import Activation
from dctlib.maps.orthogonalise import normalise, orthonormal_rows
from dctlib.maps.synthetic import synthetic_map

D = 24


def transcoder(U, V, alpha, activation: Activation = "exponential", input_scale=1.0):
    nothing = torch.zeros(0)
    return Transcoder(U, V, alpha, activation, input_scale, None, None, nothing, nothing, 0.0)


def truth(planted, activation, input_scale=1.0):
    return transcoder(planted.U, planted.V, planted.alpha, activation, input_scale)


def test_a_permutation_is_undone_and_signs_count_only_where_they_mean_something():
    V = orthonormal_rows(unit_rows(5, 8))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(matched_cosine(V, V[order]), torch.ones(5, dtype=torch.float64))
    turned = V[order] * torch.tensor([1, -1, 1, -1, -1])[:, None]
    torch.testing.assert_close(matched_cosine(V, turned, signed=False), torch.ones(5, dtype=torch.float64))
    assert matched_cosine(V, turned).sum() < 3


def test_partners_are_named_in_the_order_of_their_cosines():
    V = orthonormal_rows(unit_rows(4, 8))
    order = torch.tensor([2, 0, 3])
    rows, columns = match_factors(V, V[order])
    assert rows.tolist() == [0, 2, 3]
    assert order[columns].tolist() == rows.tolist()
    torch.testing.assert_close(matched_cosine(V, V[order]), torch.ones(3, dtype=torch.float64))


def test_no_factor_is_matched_twice():
    V = orthonormal_rows(unit_rows(2, 8))
    near = normalise(V[0] + 0.1 * V[1:])
    found = matched_cosine(V, torch.cat([V[:1], near]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.1 / 1.01**0.5], dtype=torch.float64))


def test_the_sum_is_the_largest_not_the_greedy_one():
    one = torch.eye(2, dtype=torch.float64)
    two = torch.tensor([[0.8, 0.6], [0.9, -(0.19**0.5)]], dtype=torch.float64)  # both nearest to the first
    torch.testing.assert_close(matched_cosine(one, two), torch.tensor([0.9, 0.6], dtype=torch.float64))


def test_two_fits_of_a_planted_map_share_its_factors_and_little_else():
    planted = synthetic_map(8, 96, dtype=torch.float64)
    options = {"num_factors": 24, "input_scale": 4.0, "iterations": 20, "orthogonalise": "soft", "progress": False}
    one, two = (fit_exponential(planted.cmap, init="random", seed=seed, **options) for seed in (1, 2))
    shared = matched_cosine(one.V, two.V).sort(descending=True).values
    assert shared[:8].min() > 0.98
    assert matched_cosine(unit_rows(24, 96), unit_rows(24, 96, seed=1)).max() < 0.6


def test_overlap_is_that_of_the_spans():
    basis = orthonormal_rows(unit_rows(6, 10))
    assert subspace_overlap(basis[:3], unit_rows(3, 3, seed=2) @ basis[:3]) == pytest.approx(1)
    assert subspace_overlap(basis[:3], basis[3:]) == pytest.approx(0)
    assert subspace_overlap(basis[:2], basis[1:]) == pytest.approx(0.5)
    assert subspace_overlap(basis[:2], torch.cat([basis, basis])) == pytest.approx(1)  # dependent rows
    tilted = (0.6 * basis[0] + 0.8 * basis[1])[None]
    assert subspace_overlap(basis[:1], 7 * tilted) == pytest.approx(0.36)


def test_random_spans_overlap_by_their_share_of_the_dimensions():
    overlaps = [subspace_overlap(unit_rows(3, 30, seed=seed), unit_rows(12, 30, seed=100 + seed)) for seed in range(40)]
    assert sum(overlaps) / 40 == pytest.approx(12 / 30, abs=0.03)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 7), k=st.integers(1, 7), seed=st.integers(0, 10**6))
def test_neither_depends_on_which_comes_first_nor_on_the_basis(m, k, seed):
    one, two = unit_rows(m, 5, seed=seed), unit_rows(k, 5, seed=seed + 1)
    turn = orthonormal_rows(unit_rows(5, 5, seed=seed + 2))
    found = matched_cosine(one, two)
    assert found.shape == (min(m, k),)
    torch.testing.assert_close(found.sum(), matched_cosine(two @ turn, one @ turn).sum())
    assert subspace_overlap(one, two) == pytest.approx(subspace_overlap(two @ turn, one @ turn), abs=1e-9)


@pytest.mark.parametrize("compare", [matched_cosine, subspace_overlap])
def test_fits_of_other_widths_are_refused(compare):
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 6\)"):
        compare(unit_rows(2, 5), unit_rows(2, 6))
    with pytest.raises(ValueError, match="expected"):
        compare(unit_rows(2, 5), torch.zeros(0, 5))


def test_zeros_span_nothing():
    with pytest.raises(ValueError, match="only rows of zeros"):
        subspace_overlap(torch.zeros(2, 5), unit_rows(2, 5))


def test_copies_share_a_cluster_and_opposites_do_not():
    base = torch.eye(8)[:3]
    vectors = torch.cat([base, base + 0.05 * unit_rows(3, 8).float(), -base[:1]])
    assert cosine_clusters(vectors) == [0, 1, 2, 0, 1, 2, 3]
    assert cosine_clusters(base[:1]) == [0]
    with pytest.raises(ValueError, match="cosine=1"):
        cosine_clusters(vectors, cosine=1.0)


def test_recovery_ignores_sign_and_order():
    true = unit_rows(4, 10)
    found = torch.cat([-true[[2, 0]], unit_rows(5, 10, seed=8), true[[3]]])
    result = recovery(true, found)
    assert result.recovered == 0.75
    assert 0.75 < result.mean_max_cosine < 1


def test_similarity_of_orthogonal_and_of_equal_directions():
    apart = similarity(torch.eye(3, 5))
    assert (apart.condition_number, apart.mean_abs_cosine, apart.sd_abs_cosine) == pytest.approx((1, 0, 0))
    half = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-0.6, 0.8]])
    found = similarity(half)
    assert found.mean_abs_cosine == pytest.approx((0.6 + 0.6 + 0.28) / 3)
    assert similarity(half[:2]).condition_number == pytest.approx((1.6 / 0.4) ** 0.5)
    with pytest.raises(ValueError, match="at least 2"):
        similarity(half[:1])


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
