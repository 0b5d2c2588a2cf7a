"""Fitting a transcoder to a causal map: the post's Algorithms 1, 1′, 2 and 3.

Factors are rows, so U and V are the post's matrices transposed. Each loop below is one algorithm, with one step a line.
"""

import time
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from dctlib.fits.calibration import check_input_scale
from dctlib.fits.linalg import exponential_weights, quadratic_weights
from dctlib.fits.transcoder import Transcoder
from dctlib.maps.base import DifferentiableMap, check_finite, gaussian
from dctlib.maps.nonlinearity import Activation
from dctlib.maps.orthogonalise import normalise, orthonormal_rows, softly_orthogonal_rows

FIT_VERSION = 1
"""Raise it with any change that alters what a fit returns: remembered fits are keyed by it."""

Init = Literal["projected", "random", "axes"]

Orthogonalise = Literal["qr", "soft"]

_ORTHOGONALISE: dict[str, Callable[[Tensor], Tensor]] = {"qr": orthonormal_rows, "soft": softly_orthogonal_rows}


def fit_linear(
    cmap: DifferentiableMap,
    num_factors: int = 256,
    projections: int | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Transcoder:
    """Fit Δ̂(θ) = Σ α ⟨v, θ⟩ u by singular value decomposition of the Jacobian T1 at 0 (Algorithms 1 and 1′).

    Parameters
    ----------
    cmap : DifferentiableMap
        The map Δ.
    num_factors : int
        m. At most the rank that the Jacobian can have, min(d_source, d_target); with `projections`, d_source.
        Factors have no sign, so the default is half of :func:`fit_exponential`'s.
    projections : int, optional
        Left out, Algorithm 1: decompose all d_target rows of T1. Otherwise Algorithm 1′: decompose W·T1 for a
        Gaussian W of this many rows, 32 in the post, which costs d_target / `projections` times less. Only the first
        `projections` input directions carry information. Further factors are random and orthogonal to these, so that
        fits of equal width can be compared.
    seed : int
        Seed of W and of the random directions. Unused without `projections`.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Transcoder
        Its rows of V are orthonormal, most important first. Rank those of :meth:`Transcoder.with_negations`.

    Raises
    ------
    ValueError
        If an option is out of range, or the Jacobian is not finite.
    """
    trace = _Trace(cmap)
    if projections is None:
        _check_width(num_factors, min(cmap.d_source, cmap.d_target), "the Jacobian's rank bounds a linear fit")
        T1 = _jacobian_rows(cmap, torch.eye(cmap.d_target), progress)
        left, singular_values, right = torch.linalg.svd(T1, full_matrices=False)
        U, V, alpha = left.T[:num_factors], right[:num_factors], singular_values[:num_factors]
    else:
        _check_width(num_factors, cmap.d_source, "orthonormal rows of V bound a projected fit")
        V, image = _projected(cmap, num_factors, projections, torch.Generator().manual_seed(seed), progress)
        U, alpha = _unit(image), image.norm(dim=1)
    return trace.result(U, V, alpha, "linear")


def fit_quadratic(
    cmap: DifferentiableMap,
    num_factors: int = 256,
    iterations: int = 10,
    *,
    orthogonalise: Orthogonalise = "qr",
    tolerance: float = 0.0,
    projections: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Transcoder:
    """Fit Δ̂(θ) = Σ α ⟨v, θ⟩² u to the second derivative T2 of Δ at 0 by orthogonalised ALS (Algorithm 2).

    Parameters
    ----------
    cmap : DifferentiableMap
        The map Δ.
    num_factors : int
        m, at most d_source unless `orthogonalise` is ``"soft"``. Factors have no sign, so the default is half of
        :func:`fit_exponential`'s.
    iterations, orthogonalise, tolerance, projections, seed, progress
        As in :func:`fit_exponential`. The fit starts from Algorithm 1′.

    Returns
    -------
    Transcoder
        Its importance is T2(u, v, v), the causal part of equation 8. Rank :meth:`Transcoder.with_negations`.

    Raises
    ------
    ValueError
        If an option is out of range, the derivatives are not finite, or they vanish.
    """
    trace = _Trace(cmap)
    _check_options(cmap, num_factors, iterations, orthogonalise, tolerance)
    orthogonal = _ORTHOGONALISE[orthogonalise]

    U, V = _start(cmap, num_factors, "projected", projections, seed, progress)
    for _ in tqdm(range(iterations), desc=f"fitting {num_factors} factors", disable=not progress):
        before = V
        V = orthogonal(V)
        Tvv = cmap.second_derivative(V, V)
        U = _unit(Tvv)  # equation 6.1: u_l ← T2(·, v_l, v_l)
        V = _unit(cmap.second_derivative_vjp(U, V))  # equation 6.2: v_l ← T2(u_l, v_l, ·)
        if trace.record(Tvv.norm(dim=1), V - before) < tolerance:
            break
    alpha = quadratic_weights(U, V, (U * cmap.second_derivative(V, V)).sum(1))
    return trace.result(U, V, alpha, "quadratic")


def fit_exponential(
    cmap: DifferentiableMap,
    num_factors: int = 512,
    *,
    input_scale: float,
    iterations: int = 10,
    init: Init = "projected",
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
        τ. Ten suffice at widths of a few hundred; narrow fits need more.
    init : {"projected", "random", "axes"}
        Where V starts. ``"projected"``: Algorithm 1′. ``"random"``: random directions, with random U. ``"axes"``:
        `num_factors` different coordinate axes in a random order, with U = normalise(T1 V). Factors beyond the number
        of axes start at random. Coordinates of a residual stream mean little, so this V is orthonormal and independent
        of the map.
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
        With the causal importance of each factor and the movement of V in each iteration.

    Raises
    ------
    ValueError
        If an option is out of range, the gradients are not finite, or the factors vanish.
    """
    trace = _Trace(cmap)
    _check_options(cmap, num_factors, iterations, orthogonalise, tolerance)
    R = check_input_scale(input_scale)
    orthogonal = _ORTHOGONALISE[orthogonalise]

    U, V = _start(cmap, num_factors, init, projections, seed, progress)
    for _ in tqdm(range(iterations), desc=f"fitting {num_factors} factors", disable=not progress):
        before = V
        V = orthogonal(V)
        values, gradients = cmap.value_and_vjp(R * V, U)  # Δ_R(v_l), and ∇⟨u_l, Δ⟩ at R v_l with the old u_l
        importance = (U * values).sum(1)  # ⟨u_l, Δ_R(v_l)⟩, the causal part of equation 10
        U, V = _unit(values), _unit(gradients)  # the gradients of equation 10 by u_l and by v_l
        if trace.record(importance, V - before) < tolerance:
            break
    alpha = exponential_weights(U, V, (U * cmap(R * V)).sum(1))
    return trace.result(U, V, alpha, "exponential", input_scale=R)


class _Trace:
    """The record of a fit's iterations, and the transcoder made at its end."""

    def __init__(self, cmap: DifferentiableMap):
        self._cmap = cmap
        self._importance: list[Tensor] = []
        self._change: list[float] = []
        self._started = time.perf_counter()

    def record(self, importance: Tensor, step: Tensor) -> float:
        """Add an iteration, and return the root-mean-square distance that a row of V moved."""
        self._importance.append(importance)
        self._change.append(step.square().sum(1).mean().sqrt().item())
        return self._change[-1]

    def result(
        self, U: Tensor, V: Tensor, alpha: Tensor, activation: Activation, input_scale: float = 1.0
    ) -> Transcoder:
        return Transcoder(
            U=U.contiguous(),
            V=V.contiguous(),
            alpha=alpha.contiguous(),
            activation=activation,
            input_scale=input_scale,
            source=self._cmap.source,
            target=self._cmap.target,
            objective=torch.tensor([importance.sum().item() for importance in self._importance]),
            change=torch.tensor(self._change),
            seconds=time.perf_counter() - self._started,
            importance=torch.stack(self._importance) if self._importance else V.new_empty(0, len(V)),
        )


def _start(
    cmap: DifferentiableMap, num_factors: int, init: Init, projections: int, seed: int, progress: bool
) -> tuple[Tensor, Tensor]:
    """Return U and V with which Algorithms 2 and 3 start."""
    generator = torch.Generator().manual_seed(seed)
    match init:
        case "projected":
            V, image = _projected(cmap, num_factors, projections, generator, progress)
            return _unit(image), V
        case "random":
            U = gaussian(cmap, num_factors, cmap.d_target, generator)
            V = gaussian(cmap, num_factors, cmap.d_source, generator)
            return _unit(U), _unit(V)
        case "axes":
            order = torch.randperm(cmap.d_source, generator=generator)[:num_factors]
            axes = torch.eye(cmap.d_source, dtype=cmap.dtype)[order].to(cmap.device)
            V = torch.cat([axes, _unit(gaussian(cmap, num_factors - len(axes), cmap.d_source, generator))])
            return _unit(cmap.jvp(torch.zeros_like(V), V)), V
    raise ValueError(f"got init={init!r}, expected one of {get_args(Init)}")


def _projected(
    cmap: DifferentiableMap, num_factors: int, projections: int, generator: torch.Generator, progress: bool
) -> tuple[Tensor, Tensor]:
    """Return V and T1 V of Algorithm 1′; rows of V beyond the rank of W·T1 are random."""
    if projections < 1:
        raise ValueError(f"got projections={projections}, expected at least 1; the post takes 32")
    W = gaussian(cmap, projections, cmap.d_target, generator)
    WT1 = _jacobian_rows(cmap, W, progress)
    right = torch.linalg.svd(WT1, full_matrices=False).Vh
    filling = gaussian(cmap, max(0, num_factors - len(right)), cmap.d_source, generator)
    V = torch.cat([right, filling])
    leading = min(num_factors, cmap.d_source)
    V = torch.cat([orthonormal_rows(V[:leading]), _unit(V[leading:num_factors])])
    return V, cmap.jvp(torch.zeros_like(V), V)


def _jacobian_rows(cmap: DifferentiableMap, cotangents: Tensor, progress: bool) -> Tensor:
    """Return the rows w_iᵀ T1, computed a chunk at a time."""
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
        raise ValueError(f"got iterations={iterations}, tolerance={tolerance}, expected at least 1, at least 0")
    if orthogonalise == "qr":
        _check_width(
            num_factors, cmap.d_source, "orthonormal rows of V bound the fit; orthogonalise='soft' allows more"
        )
    elif num_factors < 1:
        raise ValueError(f"got num_factors={num_factors}, expected at least 1")


def _check_width(num_factors: int, most: int, why: str) -> None:
    if not 1 <= num_factors <= most:
        raise ValueError(f"got num_factors={num_factors}, expected 1 to {most}: {why}")
