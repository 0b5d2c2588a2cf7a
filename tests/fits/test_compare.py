import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import unit_rows

from dctlib import fit_exponential
from dctlib.fits.compare import cosine_clusters, match_factors, matched_cosine, subspace_overlap
from dctlib.maps.orthogonalise import normalise, orthonormal_rows
from dctlib.maps.synthetic import synthetic_map
from dctlib.paper.experiments.agreement import same_change
from dctlib.steering.effects import Effects


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
