"""Fitting a transcoder to a causal map: the post's Algorithms 1, 1′ and 3."""

import time
from typing import Literal

import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor
from tqdm import tqdm

from dctlib.causal_map import DifferentiableMap
from dctlib.transcoder import Transcoder


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
        V, outputs = _projected(cmap, num_factors, projections, torch.Generator().manual_seed(seed), progress)
        alpha = outputs.norm(dim=1)
        U = _normalise(outputs)
    return _result(cmap, U, V, alpha, "linear", 1.0, [], [], started)


def fit_exponential(
    cmap: DifferentiableMap,
    *,
    num_factors: int,
    input_scale: float,
    iterations: int = 10,
    init: Literal["projected", "random"] = "projected",
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
        m, at most d_source: each iteration makes the rows of V orthonormal.
    input_scale : float
        R, from :func:`dctlib.calibrate`. Larger values weigh higher derivatives more.
    iterations : int
        τ. Ten suffice at widths of a few hundred; narrow fits take longer.
    init : {"projected", "random"}
        Start from Algorithm 1′, or from random directions.
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
        If `num_factors`, `input_scale` or `init` is out of range, or the gradients are not finite.
    """
    started = time.perf_counter()
    _check_width(num_factors, cmap.d_source, "orthonormal rows of V bound an orthogonalised fit")
    if not 0 < input_scale < float("inf"):
        raise ValueError(f"got input_scale={input_scale}, expected a positive number; calibrate(cmap) finds one")
    R = input_scale
    U, V = _start(cmap, num_factors, init, projections, seed, progress)
    objective, change = [], []
    for _ in tqdm(range(iterations), desc=f"OGI, {num_factors} factors", disable=not progress):
        before, V = V, orthonormal_rows(V)
        values, gradients = cmap.value_and_vjp(R * V, U)  # Δ_R(v_l) and ∇⟨u_l, Δ(·)⟩ at R v_l: step 2 of Algorithm 3
        objective.append((U * values).sum().item())
        U, V = _normalise(values), _normalise(gradients)
        change.append((V - before).square().sum(1).mean().sqrt().item())
    alpha = exponential_weights(U, V, (U * cmap(R * V)).sum(1))
    return _result(cmap, U, V, alpha, "exponential", R, objective, change, started)


def exponential_weights(
    U: Float[Tensor, "m d_target"], V: Float[Tensor, "m d_source"], importance: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """α ≥ 0 that minimises ½ αᵀKα − αᵀb, with K_ll′ = ⟨u_l, u_l′⟩(exp⟨v_l, v_l′⟩ − 1) and b_l = ⟨u_l, Δ_R(v_l)⟩.

    This is equation 10 with U and V held. K is positive semidefinite and, where factors nearly coincide, singular;
    its small eigenvalues are raised to float32's resolution, so that such factors share their weight.
    """
    U, V, b = U.double(), V.double(), importance.double()
    K = (U @ U.T) * torch.expm1(V @ V.T)
    values, vectors = torch.linalg.eigh(K)
    values = values.clamp(min=torch.finfo(torch.float32).eps * len(K) * values[-1].item())
    root = values.sqrt()[:, None] * vectors.T  # K ≈ rootᵀ root
    right = (vectors.T @ b) / values.sqrt()
    alpha, _ = nnls(root.cpu().numpy(), right.cpu().numpy(), maxiter=30 * len(K))
    return torch.as_tensor(alpha, dtype=importance.dtype, device=importance.device)


def orthonormal_rows(V: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """Q of the QR decomposition of the rows of V, with R's diagonal positive.

    LAPACK leaves the signs of that diagonal open and usually makes them negative, which would turn v into −v: for an
    exponential factor another function altogether.
    """
    Q, R = torch.linalg.qr(V.T)
    return (Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).T.contiguous()


def _start(
    cmap: DifferentiableMap, num_factors: int, init: str, projections: int, seed: int, progress: bool
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if init == "projected":
        V, outputs = _projected(cmap, num_factors, projections, generator, progress)
        return _normalise(outputs), V
    if init == "random":
        U, V = (_gaussian(num_factors, d, cmap, generator) for d in (cmap.d_target, cmap.d_source))
        return _normalise(U), _normalise(V)
    raise ValueError(f"got init={init!r}, expected 'projected' or 'random'")


def _projected(
    cmap: DifferentiableMap, num_factors: int, projections: int, generator: torch.Generator, progress: bool
) -> tuple[Tensor, Tensor]:
    """V and T1·V of Algorithm 1′; rows of V beyond the rank of W·T1 are random."""
    _check_width(num_factors, cmap.d_source, "orthonormal rows of V bound a projected fit")
    if projections < 1:
        raise ValueError(f"got projections={projections}, expected at least 1")
    W = _gaussian(projections, cmap.d_target, cmap, generator)
    rows = _jacobian_rows(cmap, W, progress)
    right = torch.linalg.svd(rows, full_matrices=False).Vh
    filling = _gaussian(max(0, num_factors - len(right)), cmap.d_source, cmap, generator)
    V = orthonormal_rows(torch.cat([right, filling]))[:num_factors]
    return V, cmap.jvp(torch.zeros_like(V), V)


def _jacobian_rows(cmap: DifferentiableMap, cotangents: Tensor, progress: bool) -> Tensor:
    """Rows w_iᵀ T1 of the Jacobian at 0, by vjp, a chunk at a time."""
    chunks = cotangents.to(cmap.device, cmap.dtype).split(cmap.chunk_size)
    zero = torch.zeros(cmap.chunk_size, cmap.d_source, dtype=cmap.dtype, device=cmap.device)
    bar = tqdm(chunks, desc=f"Jacobian, {len(cotangents)} rows", disable=not progress)
    return torch.cat([cmap.vjp(zero[: len(chunk)], chunk) for chunk in bar])


def _gaussian(rows: int, columns: int, cmap: DifferentiableMap, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=cmap.dtype).to(cmap.device)


def _normalise(rows: Tensor) -> Tensor:
    if not torch.isfinite(rows).all():
        raise ValueError("the map gave values that are not finite; try dtype='float32' or a smaller input scale")
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


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
