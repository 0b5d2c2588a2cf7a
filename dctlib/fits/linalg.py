"""The weights α of a transcoder, given its directions: non-negative least squares on a kernel of similarities."""

import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor


def exponential_weights(
    U: Float[Tensor, "m d_target"], V: Float[Tensor, "m d_source"], importance: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """α ≥ 0 that minimises ½ αᵀKα − αᵀb, with K_ll′ = ⟨u_l, u_l′⟩(exp⟨v_l, v_l′⟩ − 1) and b_l = ⟨u_l, Δ_R(v_l)⟩.

    This is equation 10 with U and V held.
    """
    U, V = U.double(), V.double()
    return _nonnegative((U @ U.T) * torch.expm1(V @ V.T), importance)


def quadratic_weights(
    U: Float[Tensor, "m d_target"], V: Float[Tensor, "m d_source"], importance: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """α ≥ 0 that minimises ‖T2 − 2 Σ α_l u_l ⊗ v_l ⊗ v_l‖², where b_l = T2(u_l, v_l, v_l).

    This is equation 8 with U and V held, but for the factor 2: the second derivative of α⟨v, θ⟩² u is 2α u ⊗ v ⊗ v, and
    with it Δ̂ is the quadratic part of Δ itself.
    """
    U, V = U.double(), V.double()
    return _nonnegative(2 * (U @ U.T) * (V @ V.T).square(), importance)


def _nonnegative(K: Tensor, b: Tensor) -> Tensor:
    """α ≥ 0 that minimises ½ αᵀKα − αᵀb.

    K is positive semidefinite and, where factors nearly coincide, singular; its small eigenvalues are raised to
    float32's resolution, so that such factors share their weight.
    """
    if not K.any():
        raise ValueError("the map has no such part: its factors vanish. Fit linear ones, or a slice with curvature")
    values, vectors = torch.linalg.eigh(K)
    values = values.clamp(min=torch.finfo(torch.float32).eps * len(K) * values[-1].item())
    root = values.sqrt()[:, None] * vectors.T  # K ≈ rootᵀ root
    right = (vectors.T @ b.double()) / values.sqrt()
    alpha, _ = nnls(root.cpu().numpy(), right.cpu().numpy(), maxiter=30 * len(K))
    return torch.as_tensor(alpha, dtype=b.dtype, device=b.device)
