"""The weights α of a transcoder, given its directions: non-negative least squares on a kernel of similarities."""

import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor


def exponential_weights(
    U: Float[Tensor, "m d_target"], V: Float[Tensor, "m d_source"], importance: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """Return α ≥ 0 that minimises ½ αᵀKα − αᵀb: equation 10 with U and V held fixed, the end of Algorithm 3.

    Parameters
    ----------
    U, V : Tensor, (m, d_target) and (m, d_source)
        Unit rows; K_ll′ = ⟨u_l, u_l′⟩(exp⟨v_l, v_l′⟩ − 1).
    importance : Tensor, (m,)
        b_l = ⟨u_l, Δ_R(v_l)⟩.

    Raises
    ------
    ValueError
        If all factors vanish.
    """
    U, V = U.double(), V.double()
    return _nonnegative((U @ U.T) * torch.expm1(V @ V.T), importance)


def quadratic_weights(
    U: Float[Tensor, "m d_target"], V: Float[Tensor, "m d_source"], importance: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """Return α ≥ 0 that minimises ‖T2 − 2 Σ α_l u_l ⊗ v_l ⊗ v_l‖²: equation 8 with U and V held fixed.

    The factor 2 is not in the post. The second derivative of α⟨v, θ⟩² u is 2α u ⊗ v ⊗ v, so the factor makes Δ̂ the
    quadratic part of Δ itself, and α is half of the post's.

    Parameters
    ----------
    U, V : Tensor, (m, d_target) and (m, d_source)
        Unit rows; K_ll′ = 2⟨u_l, u_l′⟩⟨v_l, v_l′⟩².
    importance : Tensor, (m,)
        b_l = T2(u_l, v_l, v_l).

    Raises
    ------
    ValueError
        If all factors vanish.
    """
    U, V = U.double(), V.double()
    return _nonnegative(2 * (U @ U.T) * (V @ V.T).square(), importance)


def _nonnegative(K: Tensor, b: Tensor) -> Tensor:
    """Solve for α ≥ 0 by non-negative least squares on a root of K.

    K is positive semidefinite, and singular where factors nearly coincide. Its small eigenvalues are raised to
    float32's resolution, so that such factors share their weight.
    """
    if not K.any():
        raise ValueError("the map has no part of this kind: its factors vanish; fit linear factors, or another slice")
    values, vectors = torch.linalg.eigh(K)
    values = values.clamp(min=torch.finfo(torch.float32).eps * len(K) * values[-1].item())
    root = values.sqrt()[:, None] * vectors.T  # K ≈ rootᵀ root
    right = (vectors.T @ b.double()) / values.sqrt()
    alpha, _ = nnls(root.cpu().numpy(), right.cpu().numpy(), maxiter=30 * len(K))
    return torch.as_tensor(alpha, dtype=b.dtype, device=b.device)
