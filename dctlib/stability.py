"""Whether two fits found the same: factor by factor, as subspaces, and in what their vectors make a model say."""

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dctlib.effects import Effects


def matched_cosine(
    one: Float[Tensor, "m d"], two: Float[Tensor, "k d"], *, signed: bool = True
) -> Float[Tensor, " matches"]:
    """Cosines of the pairs in which every factor has at most one partner and their sum is largest (Hungarian method).

    Parameters
    ----------
    one, two : Tensor, (m, d) and (k, d)
        Unit rows: V, or U, of two fits.
    signed : bool
        Whether v and −v differ, as in exponential fits. Take False for linear and quadratic ones.

    Returns
    -------
    Tensor, (min(m, k),)
        Float64, in the order of the rows of `one` that have a partner.

    Raises
    ------
    ValueError
        If the widths differ, or there is no row.
    """
    rows, columns = matched(one, two, signed=signed)
    one, two = _double(one, two)
    cosine = (one[rows] * two[columns]).sum(1)
    return cosine if signed else cosine.abs()


def matched(
    one: Float[Tensor, "m d"], two: Float[Tensor, "k d"], *, signed: bool = True
) -> tuple[Int[Tensor, " matches"], Int[Tensor, " matches"]]:
    """Numbers of the rows of `one` that :func:`matched_cosine` pairs, in order, and of their partners in `two`."""
    one, two = _double(one, two)
    cosine = one @ two.T
    rows, columns = linear_sum_assignment((cosine if signed else cosine.abs()).numpy(), maximize=True)
    return torch.as_tensor(rows), torch.as_tensor(columns)


def same_change(one: Effects, two: Effects) -> float | None:
    """Of the next tokens that a vector or its partner changes: the fraction that both change, to the same token.

    Parameters
    ----------
    one, two : Effects
        Of k vectors, and of their partners in the same order, on the same n texts.

    Returns
    -------
    float or None
        None if none changes any.

    Raises
    ------
    ValueError
        If they are not of as many vectors and texts.
    """
    if one.token.shape != two.token.shape:
        raise ValueError(
            f"got tokens of shapes {tuple(one.token.shape)} and {tuple(two.token.shape)}, expected equal ones"
        )
    changed = (one.token != one.clean) | (two.token != two.clean)
    return (one.token == two.token)[changed].float().mean().item() if changed.any() else None


def subspace_overlap(one: Float[Tensor, "m d"], two: Float[Tensor, "k d"]) -> float:
    """Mean squared cosine of the principal angles between the spans of two sets of rows.

    It is 1 if the smaller span lies in the larger, 0 if they are orthogonal, and about (larger dimension) / d for
    random ones. Rows may be more than d, or dependent.

    Raises
    ------
    ValueError
        If the widths differ, or a set has no row that is not 0.
    """
    bases = [_basis(rows) for rows in _double(one, two)]
    return torch.linalg.svdvals(bases[0] @ bases[1].T).square().mean().item()


def _basis(rows: Tensor) -> Tensor:
    """Orthonormal rows with the same span, up to float32's resolution."""
    _, singular, right = torch.linalg.svd(rows, full_matrices=False)
    if not singular[0] > 0:
        raise ValueError("got only rows of zeros, expected a set that spans something")
    return right[singular > singular[0] * max(rows.shape) * torch.finfo(torch.float32).eps]


def _double(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    if one.ndim != 2 or two.ndim != 2 or one.shape[1] != two.shape[1] or not len(one) or not len(two):
        raise ValueError(
            f"got shapes {tuple(one.shape)} and {tuple(two.shape)}, expected (m, d) and (k, d); fits are comparable "
            f"at one layer of one model"
        )
    return one.double().cpu(), two.double().cpu()
