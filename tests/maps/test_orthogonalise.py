import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import unit_rows

from dctlib.maps.orthogonalise import orthonormal_rows, softly_orthogonal_rows


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_orthonormal_rows_keep_the_span_and_turn_nothing_round(m, seed):
    rows = unit_rows(m, 8, seed=seed)
    Q = orthonormal_rows(rows)
    torch.testing.assert_close(Q @ Q.T, torch.eye(m, dtype=torch.float64))
    torch.testing.assert_close(rows @ Q.T @ Q, rows)
    assert ((rows * Q).sum(1) > 0).all()


def test_soft_orthogonalisation_parts_neighbours_and_leaves_strangers():
    base = orthonormal_rows(unit_rows(6, 20))
    near = base[0] + 0.1 * base[1]
    V = torch.cat([base[:1], near[None] / near.norm(), base[2:]])
    parted = softly_orthogonal_rows(V)
    assert V[0] @ V[1] > 0.99
    assert (parted[0] @ parted[1]).abs() < (V[0] @ V[1]).abs()
    torch.testing.assert_close(parted[2:], V[2:])
    torch.testing.assert_close(parted.norm(dim=1), torch.ones(6, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_soft_orthogonalisation_equals_its_definition_row_by_row(m, seed):
    V = unit_rows(m, 6, seed=seed)
    found = softly_orthogonal_rows(V, temperature=0.3, rounds=1)
    for row in range(m):
        others = [k for k in range(m) if k != row]
        expected = V[row].clone()
        if others:
            cosines = V[others] @ V[row]
            weights = torch.exp(cosines.abs() / 0.3) / torch.exp(cosines.abs() / 0.3).sum()
            expected -= (weights * cosines) @ V[others]
        torch.testing.assert_close(found[row], expected / expected.norm())
