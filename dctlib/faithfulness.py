"""How well a transcoder stands for the map that it was fitted to, on its factors and between them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dctlib.causal_map import FunctionMap
from dctlib.differentiable_map import DifferentiableMap
from dctlib.orthogonalise import normalise
from dctlib.transcoder import Transcoder


def probes(dct: Transcoder, *, count: int, seed: int = 0) -> dict[str, Float[Tensor, "count d_source"]]:
    """Unit directions to compare on: ``random`` ones, ``factors`` drawn from V, and ``mixed``, sums of two factors.

    Raises
    ------
    ValueError
        If `count` is below 1, or the transcoder has a single factor.
    """
    if count < 1 or len(dct) < 2:
        raise ValueError(f"got count={count} and {len(dct)} factors, expected count of at least 1 and 2 factors to mix")
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(count, dct.V.shape[1], generator=generator, dtype=dct.V.dtype).to(dct.V.device)
    first = torch.randint(len(dct), (count,), generator=generator)
    other = (first + torch.randint(1, len(dct), (count,), generator=generator)) % len(dct)
    return {"random": normalise(random), "factors": dct.V[first], "mixed": normalise(dct.V[first] + dct.V[other])}


def reconstruction_error(
    cmap: DifferentiableMap, dct: Transcoder, directions: Float[Tensor, "n d_source"], *, input_scale: float
) -> Float[Tensor, " n"]:
    """‖Δ(Rθ) − Δ̂‖ / ‖Δ(Rθ)‖ for every row θ, whatever the activation: 0 is perfect, 1 is no better than Δ̂ = 0.

    A transcoder stands for Δ at its own input scale (1 for linear and quadratic fits, the fit's R for exponential
    ones), so Δ(Rθ) is compared with Δ̂(θ · R / own).

    Parameters
    ----------
    cmap : DifferentiableMap
        The map Δ, of these prompts or of others.
    directions : Tensor, (n, d_source)
        Unit rows, such as :func:`probes`.
    input_scale : float
        R, at which to compare.

    Raises
    ------
    ValueError
        If the scale is not positive, or Δ vanishes along a direction.
    """
    if not 0 < input_scale < float("inf"):
        raise ValueError(f"got input_scale={input_scale}, expected a positive number, such as calibrate(cmap)")
    return _relative(cmap(input_scale * directions), dct(input_scale / dct.input_scale * directions.to(dct.V)))


def hessian_error(
    cmap: DifferentiableMap, dct: Transcoder, v: Float[Tensor, "n d_source"], w: Float[Tensor, "n d_source"]
) -> Float[Tensor, " n"]:
    """‖T2(·, v, w) − T̂2(·, v, w)‖ / ‖T2(·, v, w)‖ at 0 for every pair of rows; 1 for a linear transcoder.

    Raises
    ------
    ValueError
        If T2 vanishes along a pair.
    """
    options = {"dtype": dct.V.dtype, "device": dct.V.device}
    fitted = FunctionMap(dct, d_source=cmap.d_source, d_target=cmap.d_target, **options).second_derivative(v, w)
    return _relative(dct.input_scale**2 * cmap.second_derivative(v, w), fitted)


def median_errors(
    cmap: DifferentiableMap,
    dct: Transcoder,
    *,
    input_scale: float,
    count: int,
    seed: int = 0,
    along: Transcoder | None = None,
) -> dict[str, float]:
    """The median :func:`reconstruction_error` on each kind of :func:`probes`, and two of :func:`hessian_error`.

    Those, ``Hessian, random`` and ``Hessian, factors``, are of T2(·, v, v) along a quarter of the `count` probes, as a
    second derivative costs more.

    Parameters
    ----------
    along : Transcoder, optional
        Whose factors are probed: the same for transcoders that are to be compared. Left out, those of `dct`.
    """
    rows = probes(dct if along is None else along, count=count, seed=seed)
    errors = {kind: reconstruction_error(cmap, dct, of, input_scale=input_scale) for kind, of in rows.items()}
    for kind in ("random", "factors"):
        v = rows[kind][: max(1, count // 4)]
        errors[f"Hessian, {kind}"] = hessian_error(cmap, dct, v, v)
    return {kind: error.quantile(0.5).item() for kind, error in errors.items()}


def merged(dct: Transcoder, groups: Sequence[int]) -> Transcoder:
    """The transcoder with the factors of each group replaced by one: mean v, summed α u.

    The post's future work. Group them by :func:`dctlib.effects.clusters` of V, and see what it costs in
    :func:`reconstruction_error`. Factors with the same v merge without loss.

    Parameters
    ----------
    groups : sequence of int
        The number of each factor's group, from 0 on.

    Raises
    ------
    ValueError
        If there is not one number for each factor, or a number below the largest is missing.
    """
    numbers = torch.as_tensor(groups, device=dct.V.device)
    if numbers.shape != (len(dct),) or numbers.unique().tolist() != list(range(int(numbers.max()) + 1)):
        raise ValueError(f"got groups={list(groups)}, expected a number from 0 on for each of {len(dct)} factors")
    belongs = torch.nn.functional.one_hot(numbers).T.to(dct.V.dtype)  # (groups, m)
    written = belongs @ (dct.alpha[:, None] * dct.U)
    return replace(dct, U=normalise(written), V=normalise(belongs @ dct.V), alpha=written.norm(dim=1))


def _relative(true: Tensor, found: Tensor) -> Tensor:
    length = true.norm(dim=1)
    if not (length > 0).all():
        raise ValueError("the map does not change along one of the directions, so no error relates to it; leave it out")
    return (true - found.to(true.device)).norm(dim=1) / length
