"""Fitting a transcoder to a causal map: the post's Algorithms 1, 1′, 2 and 3."""

import sys
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from dctlib.fits.linalg import exponential_weights, quadratic_weights
from dctlib.fits.transcoder import Transcoder
from dctlib.maps.base import DifferentiableMap, check_finite, gaussian
from dctlib.maps.orthogonalise import normalise, orthonormal_rows, softly_orthogonal_rows

FIT_VERSION = 1
"""Raise it with any change that alters what a fit returns: remembered fits are keyed by it."""

Orthogonalise = Literal["qr", "soft"]

_ORTHOGONALISE: dict[str, Callable[[Tensor], Tensor]] = {"qr": orthonormal_rows, "soft": softly_orthogonal_rows}


def fit_linear(
    cmap: DifferentiableMap, *, num_factors: int, projections: int | None = None, seed: int = 0, progress: bool = True
) -> Transcoder:
    """Fit Δ̂(θ) = Σ α ⟨v, θ⟩ u by singular value decomposition of the Jacobian T1 at 0 (Algorithms 1 and 1′).

    Parameters
    ----------
    cmap : DifferentiableMap
        The map Δ.
    num_factors : int
        m. At most the rank that the Jacobian can have, min(d_source, d_target); with `projections`, d_source.
    projections : int, optional
        Decompose W·T1 for a Gaussian W with this many rows (32 in the post) in place of all d_target rows of T1: much
        cheaper. Only that many input directions carry information; factors beyond them are random, orthogonal to
        the rest, there to make equal widths comparable.
    seed : int
        Seed of W and of the random directions. Unused without `projections`.

    Returns
    -------
    Transcoder
        Rows of V orthonormal, most important first.

    Raises
    ------
    ValueError
        If `num_factors` is out of range.
    """
    started = time.perf_counter()
    if projections is None:
        _check_width(num_factors, min(cmap.d_source, cmap.d_target), "the Jacobian's rank bounds a linear fit")
        jacobian = _jacobian_rows(cmap, torch.eye(cmap.d_target), progress)
        left, singular_values, right = torch.linalg.svd(jacobian, full_matrices=False)
        U, V, alpha = left.T[:num_factors], right[:num_factors], singular_values[:num_factors]
    else:
        _check_width(num_factors, cmap.d_source, "orthonormal rows of V bound a projected fit")
        V, outputs = _projected(cmap, num_factors, projections, torch.Generator().manual_seed(seed), progress)
        alpha = outputs.norm(dim=1)
        U = _unit(outputs)
    return _result(cmap, U, V, alpha, "linear", 1.0, [], [], started)


def fit_quadratic(
    cmap: DifferentiableMap,
    *,
    num_factors: int,
    iterations: int = 10,
    orthogonalise: Orthogonalise = "qr",
    tolerance: float = 0.0,
    projections: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Transcoder:
    """Fit Δ̂(θ) = Σ α ⟨v, θ⟩² u to the second derivative of Δ at 0 by orthogonalised ALS (Algorithm 2).

    Parameters
    ----------
    cmap : DifferentiableMap
        The map Δ.
    num_factors : int
        m, at most d_source unless `orthogonalise` is ``"soft"``.
    iterations, orthogonalise, tolerance, projections, seed, progress
        As in :func:`fit_exponential`. It starts from Algorithm 1′.

    Returns
    -------
    Transcoder
        Factors have no sign: rank :meth:`Transcoder.with_negations`. `objective` is Σ T2(u, v, v).

    Raises
    ------
    ValueError
        If an option is out of range, or the derivatives are not finite.
    """
    started = time.perf_counter()
    _check_options(cmap, num_factors, iterations, orthogonalise, tolerance)

    def sweep(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # step 2 of Algorithm 2
        U = cmap.second_derivative(V, V)
        return U, cmap.second_derivative_vjp(_unit(U), V), U.norm(dim=1)

    U, V = _start(cmap, num_factors, "projected", projections, seed, progress)
    U, V, objective, change = _iterate(sweep, U, V, iterations, orthogonalise, tolerance, progress)
    alpha = quadratic_weights(U, V, (U * cmap.second_derivative(V, V)).sum(1))
    return _result(cmap, U, V, alpha, "quadratic", 1.0, objective, change, started)


def fit_exponential(
    cmap: DifferentiableMap,
    *,
    num_factors: int,
    input_scale: float,
    iterations: int = 10,
    init: Literal["projected", "random"] = "projected",
    orthogonalise: Orthogonalise = "qr",
    tolerance: float = 0.0,
    projections: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Transcoder:
    """Fit Δ̂(θ) = Σ α (exp⟨v, θ⟩ − 1) u to Δ(Rθ) by orthogonalised gradient iteration (Algorithm 3).

    Parameters
    ----------
    cmap : DifferentiableMap
        The map Δ.
    num_factors : int
        m, at most d_source unless `orthogonalise` is ``"soft"``.
    input_scale : float
        R, from :func:`dctlib.calibrate`. Larger values weigh higher derivatives more.
    iterations : int
        τ. Ten suffice at widths of a few hundred; narrow fits take longer.
    init : {"projected", "random"}
        Start from Algorithm 1′, or from random directions.
    orthogonalise : {"qr", "soft"}
        Between iterations, make the rows of V orthonormal, or only push near neighbours apart
        (:func:`dctlib.maps.orthogonalise.softly_orthogonal_rows`), which allows more factors than d_source.
    tolerance : float
        Stop early once V moves less than this (root mean square over rows, which have length 1), such as 1e-4.
    projections : int
        Rows of W in Algorithm 1′.
    seed : int
        Seed of the start. The iteration itself draws nothing.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Transcoder
        With the causal importance and the movement of V in each iteration.

    Raises
    ------
    ValueError
        If an option is out of range, or the gradients are not finite.
    """
    started = time.perf_counter()
    _check_options(cmap, num_factors, iterations, orthogonalise, tolerance)
    if not 0 < input_scale < float("inf"):
        raise ValueError(f"got input_scale={input_scale}, expected a positive number; calibrate(cmap) finds one")
    R = input_scale

    def sweep(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # step 2 of Algorithm 3
        values, gradients = cmap.value_and_vjp(R * V, U)  # Δ_R(v_l) and ∇⟨u_l, Δ(·)⟩ at R v_l
        return values, gradients, (U * values).sum(1)

    U, V = _start(cmap, num_factors, init, projections, seed, progress)
    U, V, objective, change = _iterate(sweep, U, V, iterations, orthogonalise, tolerance, progress)
    alpha = exponential_weights(U, V, (U * cmap(R * V)).sum(1))
    return _result(cmap, U, V, alpha, "exponential", R, objective, change, started)


def _iterate(
    sweep: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    U: Tensor,
    V: Tensor,
    iterations: int,
    orthogonalise: Orthogonalise,
    tolerance: float,
    progress: bool,
) -> tuple[Tensor, Tensor, list[float], list[float]]:
    """Algorithms 2 and 3: keep the factors apart, move each by one `sweep`, normalise, until they stay."""
    objective, change = [], []
    for _ in tqdm(range(iterations), desc=f"fitting {len(V)} factors", disable=not progress):
        before, V = V, _ORTHOGONALISE[orthogonalise](V)
        U, V, importance = sweep(U, V)
        U, V = _unit(U), _unit(V)
        objective.append(importance.sum().item())
        change.append((V - before).square().sum(1).mean().sqrt().item())
        if change[-1] < tolerance:
            break
    return U, V, objective, change


def _start(
    cmap: DifferentiableMap, num_factors: int, init: str, projections: int, seed: int, progress: bool
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if init == "projected":
        V, outputs = _projected(cmap, num_factors, projections, generator, progress)
        return _unit(outputs), V
    if init == "random":
        U, V = (gaussian(cmap, num_factors, d, generator) for d in (cmap.d_target, cmap.d_source))
        return _unit(U), _unit(V)
    raise ValueError(f"got init={init!r}, expected 'projected' or 'random'")


def _projected(
    cmap: DifferentiableMap, num_factors: int, projections: int, generator: torch.Generator, progress: bool
) -> tuple[Tensor, Tensor]:
    """V and T1·V of Algorithm 1′; rows of V beyond the rank of W·T1 are random."""
    if projections < 1:
        raise ValueError(f"got projections={projections}, expected at least 1")
    W = gaussian(cmap, projections, cmap.d_target, generator)
    rows = _jacobian_rows(cmap, W, progress)
    right = torch.linalg.svd(rows, full_matrices=False).Vh
    filling = gaussian(cmap, max(0, num_factors - len(right)), cmap.d_source, generator)
    leading = min(num_factors, cmap.d_source)
    V = torch.cat([right, filling])
    V = torch.cat([orthonormal_rows(V[:leading]), _unit(V[leading:num_factors])])
    return V, cmap.jvp(torch.zeros_like(V), V)


def _jacobian_rows(cmap: DifferentiableMap, cotangents: Tensor, progress: bool) -> Tensor:
    """Rows w_iᵀ T1 of the Jacobian at 0, a chunk at a time."""
    chunks = cotangents.to(cmap.device, cmap.dtype).split(cmap.chunk_size)
    bar = tqdm(chunks, desc=f"Jacobian, {len(cotangents)} rows", disable=not progress)
    return check_finite(torch.cat([cmap.vjp_at_zero(chunk) for chunk in bar]))


def _unit(rows: Tensor) -> Tensor:
    return normalise(check_finite(rows))


def _check_options(
    cmap: DifferentiableMap, num_factors: int, iterations: int, orthogonalise: str, tolerance: float
) -> None:
    if orthogonalise not in _ORTHOGONALISE:
        raise ValueError(f"got orthogonalise={orthogonalise!r}, expected one of {sorted(_ORTHOGONALISE)}")
    if iterations < 1 or not tolerance >= 0:
        raise ValueError(f"got iterations={iterations}, tolerance={tolerance}, expected at least 1, and 0 or more")
    most = cmap.d_source if orthogonalise == "qr" else sys.maxsize
    _check_width(num_factors, most, "orthonormal rows of V bound the fit; orthogonalise='soft' allows more")


def _check_width(num_factors: int, most: int, why: str) -> None:
    if not 1 <= num_factors <= most:
        raise ValueError(f"got num_factors={num_factors}, expected 1 to {most}: {why}")


def _result(cmap, U, V, alpha, activation, input_scale, objective, change, started) -> Transcoder:
    return Transcoder(
        U=U.contiguous(),
        V=V.contiguous(),
        alpha=alpha.contiguous(),
        activation=activation,
        input_scale=float(input_scale),
        source=cmap.source,
        target=cmap.target,
        objective=torch.tensor(objective),
        change=torch.tensor(change),
        seconds=time.perf_counter() - started,
    )
