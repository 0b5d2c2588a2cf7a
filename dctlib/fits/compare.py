"""Compare fits: factor by factor, as subspaces, and by how well each approximates its map."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.linalg import subspace_angles
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dctlib.fits.calibration import check_input_scale
from dctlib.fits.transcoder import Transcoder
from dctlib.maps.base import DifferentiableMap
from dctlib.maps.function import FunctionMap
from dctlib.maps.orthogonalise import normalise


def cosine_clusters(vectors: Float[Tensor, "m d"], *, cosine: float = 0.5) -> list[int]:
    """Return a cluster number for each vector: clusters are merged while their mean cosine is at least `cosine`.

    This is average linkage. Clusters are numbered from 0 in the order of their first vectors. If vectors are sorted
    best first, the first vector of each cluster represents it.

    Raises
    ------
    ValueError
        If `cosine` is not between −1 and 1.
    """
    if not -1 < cosine < 1:
        raise ValueError(f"got cosine={cosine}, expected it between -1 and 1")
    if len(vectors) == 1:
        return [0]
    joined = linkage(vectors.double().cpu().numpy(), "average", metric="cosine")
    numbers = fcluster(joined, 1 - cosine, criterion="distance").tolist()
    order = list(dict.fromkeys(numbers))
    return [order.index(number) for number in numbers]


@dataclass(frozen=True)
class Similarity:
    """How alike directions are: largest over smallest singular value, and mean and deviation of |cosine| of pairs."""

    condition_number: float
    mean_abs_cosine: float
    sd_abs_cosine: float


def similarity(V: Float[Tensor, "m d"]) -> Similarity:
    """Return how alike at least two unit rows are."""
    if len(V) < 2:
        raise ValueError(f"got {len(V)} directions, expected at least 2 to compare")
    V = V.double()
    singular = torch.linalg.svdvals(V)
    rows, columns = torch.triu_indices(len(V), len(V), offset=1)
    cosines = (V @ V.T)[rows, columns].abs()
    condition = (singular[0] / singular[-1].clamp(min=torch.finfo(torch.float64).tiny)).item()
    return Similarity(condition, cosines.mean().item(), cosines.std(correction=0).item())


@dataclass(frozen=True)
class Recovery:
    """How well found directions cover true ones: the mean best |cosine|, and the share above a threshold."""

    mean_max_cosine: float
    recovered: float


def recovery(true: Float[Tensor, "k d"], found: Float[Tensor, "m d"], *, threshold: float = 0.99) -> Recovery:
    """Return how well unit rows `found` cover the unit rows `true`; a direction and its negation are the same."""
    best = (true.double() @ found.double().T).abs().max(dim=1).values
    return Recovery(best.mean().item(), (best > threshold).double().mean().item())


def match_factors(
    one: Float[Tensor, "m d"], two: Float[Tensor, "k d"], *, signed: bool = True
) -> tuple[Int[Tensor, " matches"], Int[Tensor, " matches"]]:
    """Return the rows of `one` and of `two` that pair up so that the sum of cosines is largest (Hungarian method).

    Parameters
    ----------
    one, two : Tensor, (m, d) and (k, d)
        Unit rows: V, or U, of two fits. No row has two partners, so there are min(m, k) pairs.
    signed : bool
        Whether v and −v differ, as in exponential fits. Take False for linear and quadratic ones.

    Returns
    -------
    tuple of Tensor, (min(m, k),) each
        Indices of the rows of `one`, ascending, and of their partners in `two`.

    Raises
    ------
    ValueError
        If the widths differ, or there is no row.
    """
    one, two = _double(one, two)
    cosine = one @ two.T
    rows, columns = linear_sum_assignment(cosine if signed else cosine.abs(), maximize=True)
    return torch.as_tensor(rows), torch.as_tensor(columns)


def matched_cosine(
    one: Float[Tensor, "m d"], two: Float[Tensor, "k d"], *, signed: bool = True
) -> Float[Tensor, " matches"]:
    """Return the cosine of each pair of :func:`match_factors`, float64: |cosine| if not `signed`."""
    rows, columns = match_factors(one, two, signed=signed)
    one, two = _double(one, two)
    cosine = (one[rows] * two[columns]).sum(1)
    return cosine if signed else cosine.abs()


def subspace_overlap(one: Float[Tensor, "m d"], two: Float[Tensor, "k d"]) -> float:
    """Return the mean squared cosine of the principal angles between the spans of two sets of rows.

    It is 1 if the smaller span lies in the larger, 0 if they are orthogonal, and about (larger dimension) / d for
    random ones. Rows may be more than d, or dependent.

    Raises
    ------
    ValueError
        If the widths differ, or a set has no row that is not 0.
    """
    one, two = _double(one, two)
    if not one.any() or not two.any():
        raise ValueError("got only rows of zeros, expected a row that is not 0 in each set")
    return float((np.cos(subspace_angles(one.T, two.T)) ** 2).mean())


def _double(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    if one.ndim != 2 or two.ndim != 2 or one.shape[1] != two.shape[1] or not len(one) or not len(two):
        raise ValueError(
            f"got shapes {tuple(one.shape)} and {tuple(two.shape)}, expected (m, d) and (k, d); fits are comparable "
            f"at one layer of one model"
        )
    return one.double().cpu(), two.double().cpu()


def probe_directions(dct: Transcoder, *, count: int, seed: int = 0) -> dict[str, Float[Tensor, "count d_source"]]:
    """Draw unit directions to compare on: ``random`` ones, ``factors`` of V, and ``mixed``, sums of two factors.

    Raises
    ------
    ValueError
        If `count` is below 1, or the transcoder has a single factor.
    """
    if count < 1 or len(dct) < 2:
        raise ValueError(f"got count={count} and {len(dct)} factors, expected at least 1, and at least 2 to mix")
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(count, dct.V.shape[1], generator=generator, dtype=dct.V.dtype).to(dct.V.device)
    first = torch.randint(len(dct), (count,), generator=generator)
    other = (first + torch.randint(1, len(dct), (count,), generator=generator)) % len(dct)
    return {"random": normalise(random), "factors": dct.V[first], "mixed": normalise(dct.V[first] + dct.V[other])}


def reconstruction_error(
    cmap: DifferentiableMap, dct: Transcoder, directions: Float[Tensor, "n d_source"], *, input_scale: float
) -> Float[Tensor, " n"]:
    """Return ‖Δ(Rθ) − Δ̂‖ / ‖Δ(Rθ)‖ for every row θ: 0 is perfect, 1 is no better than Δ̂ = 0.

    A transcoder approximates Δ at its own input scale R̂ (1 for linear and quadratic fits, the fit's R for exponential
    ones), so Δ(Rθ) is compared with Δ̂(θ · R / R̂).

    Parameters
    ----------
    cmap : DifferentiableMap
        The map Δ, of these prompts or of others.
    directions : Tensor, (n, d_source)
        Unit rows, such as :func:`probe_directions`.
    input_scale : float
        R, at which to compare.

    Raises
    ------
    ValueError
        If the scale is not positive, or Δ vanishes along a direction.
    """
    R = check_input_scale(input_scale)
    return _relative_error(cmap(R * directions), dct(R / dct.input_scale * directions.to(dct.V)))


def hessian_error(
    cmap: DifferentiableMap, dct: Transcoder, v: Float[Tensor, "n d_source"], w: Float[Tensor, "n d_source"]
) -> Float[Tensor, " n"]:
    """Return ‖T2(·, v, w) − T̂2(·, v, w)‖ / ‖T2(·, v, w)‖ at 0 for every pair of rows; 1 for a linear transcoder.

    This is the order k = 2 of the loss, equation 3, along pairs of directions.

    Raises
    ------
    ValueError
        If T2 vanishes along a pair.
    """
    fitted = FunctionMap(dct, d_source=cmap.d_source, d_target=cmap.d_target, dtype=dct.V.dtype, device=dct.V.device)
    return _relative_error(dct.input_scale**2 * cmap.second_derivative(v, w), fitted.second_derivative(v, w))


def median_errors(
    cmap: DifferentiableMap,
    dct: Transcoder,
    *,
    input_scale: float,
    count: int,
    seed: int = 0,
    along: Transcoder | None = None,
) -> dict[str, float]:
    """Return the median :func:`reconstruction_error` on each kind of :func:`probe_directions`, and of two Hessians.

    ``Hessian, random`` and ``Hessian, factors`` are medians of :func:`hessian_error` along v, v for a quarter of the
    `count` probes, because a second derivative costs more.

    Parameters
    ----------
    input_scale : float
        R, at which to compare.
    count, seed : int
        As in :func:`probe_directions`.
    along : Transcoder, optional
        The transcoder whose factors are probed, `dct` by default. Give the same one to compare several transcoders.
    """
    probes = probe_directions(dct if along is None else along, count=count, seed=seed)
    errors = {kind: reconstruction_error(cmap, dct, rows, input_scale=input_scale) for kind, rows in probes.items()}
    for kind in ("random", "factors"):
        v = probes[kind][: max(1, count // 4)]
        errors[f"Hessian, {kind}"] = hessian_error(cmap, dct, v, v)
    return {kind: error.quantile(0.5).item() for kind, error in errors.items()}


def merge_factors(dct: Transcoder, groups: Sequence[int]) -> Transcoder:
    """Return the transcoder with the factors of each group replaced by one: mean v, summed α u.

    The post leaves this to future work. Group factors by :func:`cosine_clusters` of V, and measure the cost by
    :func:`reconstruction_error`. Factors with the same v merge without loss.

    Parameters
    ----------
    dct : Transcoder
        Of m factors. Its record of the fit is kept, except for the importance of factors.
    groups : sequence of int
        The number of each factor's group, from 0 on.

    Raises
    ------
    ValueError
        If there is not one number for each factor, or a number below the largest is missing.
    """
    numbers = torch.as_tensor(groups, device=dct.V.device)
    if numbers.shape != (len(dct),) or numbers.unique().tolist() != list(range(int(numbers.max()) + 1)):
        raise ValueError(f"got groups={list(groups)}, expected a group, 0, 1, …, for each of {len(dct)} factors")
    membership = torch.nn.functional.one_hot(numbers).T.to(dct.V.dtype)  # (groups, m)
    U = membership @ (dct.alpha[:, None] * dct.U)
    V = membership @ dct.V
    return replace(dct, U=normalise(U), V=normalise(V), alpha=U.norm(dim=1), importance=None)


def _relative_error(true: Tensor, found: Tensor) -> Tensor:
    length = true.norm(dim=1)
    if not (length > 0).all():
        raise ValueError("the map does not change along a direction, so its relative error is undefined; leave it out")
    return (true - found.to(true.device)).norm(dim=1) / length
