"""Elementwise terms of every divergence in torch, written so that nothing cancels when p ≈ q.

With d = log p − log q every kind is Σ_k f_k with f_k ≥ 0, and its gradient is
    ∂L/∂s_k = (g_k − q_k·G) / T,   g_k = q_k·u_k,   G = Σ_k g_k,   u = f'(q/p) up to a constant.
The constant in u is chosen such that u = 0 where p = q, hence loss and gradient are *exactly* 0 for equal inputs, and a
common error in all d (a rounded normaliser) enters the loss only squared. The building block is
    φ(x) = x + expm1(−x) ≥ 0:   KL(p‖q) = Σ p·φ(d)   because Σ (q − p) = 0.
Nothing overflows: exponentials are taken of −|d| only. Ids that one side excludes have |d| near 1e30 and p or q = 0.
"""

import torch
from torch import Tensor


def loss_terms(kind: str, mix: float, p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """f_k ≥ 0 (up to rounding) with Σ_k f_k the divergence (jsd: see `loss_and_sum`).

    p, q and d = log p − log q are `[R, V]`, fp32 or fp64; the result is fresh.
    """
    if kind == "forward_kl":
        return weighted_phi(p, q, d)
    if kind == "reverse_kl":
        return weighted_phi(q, p, -d)
    if kind == "tvd":
        return 0.5 * _difference(p, q, d).abs()
    if kind == "alpha":
        return _alpha_terms(mix, p, q, d)
    m_over_p, m_over_q = _log_mixture_ratios(mix, d)
    m = mix * p + (1.0 - mix) * q
    if kind == "skew_kl":
        return weighted_phi(p, m, -m_over_p)
    return weighted_phi(q, m, -m_over_q)


def gradient_terms(kind: str, mix: float, p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """g_k = q_k·u_k (see the module). Same shapes as `loss_terms`; fresh result."""
    if kind == "forward_kl":
        return -_difference(p, q, d)
    if kind == "reverse_kl":
        return -q * d
    if kind == "tvd":
        return -0.5 * q * d.sign()
    if kind == "alpha":
        # q·(1 − (p/q)^α)/α; for p > q written as g·(e^{−αd} − 1) with g = p^α q^{1−α} so that no ratio overflows
        small = torch.expm1(-mix * d.abs())
        return torch.where(d > 0, _geometric(mix, p, q, d) * small, -q * small) / mix
    m_over_p, m_over_q = _log_mixture_ratios(mix, d)
    if kind == "jsd":
        return -(1.0 - mix) * q * m_over_q
    m = mix * p + (1.0 - mix) * q
    if (
        kind == "skew_kl"
    ):  # q·(1−mix)·(1 − p/M): with r = M/p, 1 − 1/r = −expm1(−log r), and q/M = e^{−log(M/q)} ≤ 1/(1−mix)
        return (1.0 - mix) * torch.exp(-m_over_q) * _excess(m, p, m_over_p)
    return -q * m_over_q + (1.0 - mix) * torch.exp(-m_over_q) * _excess(m, q, m_over_q)


def loss_and_sum(kind: str, mix: float, p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ_k f_k, G = Σ_k g_k) of each row, `[R]` each; G from the loss where an identity gives it more exactly."""
    if kind == "jsd":
        m_over_p, m_over_q = _log_mixture_ratios(mix, d)
        m = mix * p + (1.0 - mix) * q
        to_student = weighted_phi(q, m, m_over_q.neg_()).sum(-1)  # KL(q‖M)
        to_teacher = weighted_phi(p, m, m_over_p.neg_()).sum(-1)
        return mix * to_teacher + (1.0 - mix) * to_student, (1.0 - mix) * to_student
    loss = loss_terms(kind, mix, p, q, d).sum(-1)
    if kind == "forward_kl":
        return loss, torch.zeros_like(loss)
    if kind in ("reverse_kl", "alpha"):
        return loss, loss if kind == "reverse_kl" else (1.0 - mix) * loss
    return loss, gradient_terms(kind, mix, p, q, d).sum(-1)


def weighted_phi(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """a·φ(x) = a·x + b − a where b = a·e^{−x}; relative error near 2·eps/|x| for small x, which averages out in a sum."""
    near = (-x).expm1_().add_(x).mul_(a)
    far = (a * x).add_(b).sub_(a)  # where e^{−x} might overflow, b has it already
    return torch.where(x > -1.0, near, far)


def _difference(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p − q, exact to rounding when p ≈ q: max(p, q)·(1 − e^{−|d|}) with the sign of d."""
    return torch.maximum(p, q) * torch.expm1(-d.abs()).neg_() * d.sign()


def _log_mixture_ratios(mix: float, d: Tensor) -> tuple[Tensor, Tensor]:
    """log(M/p) and log(M/q) for M = mix·p + (1−mix)·q; +inf where p (or q) is 0."""
    share = (d >= 0).to(d.dtype).mul_(1.0 - 2.0 * mix).add_(mix)  # weight in M of the smaller of p and q
    log_m_over_larger = torch.log1p(share * torch.expm1(-d.abs()))
    return log_m_over_larger + (-d).clamp_min(0), log_m_over_larger + d.clamp_min(0)


def _excess(m: Tensor, a: Tensor, log_m_over_a: Tensor) -> Tensor:
    """M − a, exact to rounding when they are close."""
    return torch.where(log_m_over_a.abs() < 0.5, a * torch.expm1(log_m_over_a.clamp(-0.5, 0.5)), m - a)


def _alpha_terms(alpha: float, p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """[αp + (1−α)q − p^α q^{1−α}]/(α(1−α)) = p·[(1−α)φ(d) − φ((1−α)d)]/(α(1−α)) ≥ 0."""
    geometric = _geometric(alpha, p, q, d)
    near = (1.0 - alpha) * weighted_phi(p, q, d) - weighted_phi(p, geometric, (1.0 - alpha) * d)
    far = alpha * p + (1.0 - alpha) * q - geometric
    return torch.where(d.abs() < 0.5, near, far) / (alpha * (1.0 - alpha))


def _geometric(alpha: float, p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p^α q^{1−α} from the larger of the two: the smaller may have underflowed where its power has not."""
    decay = (d >= 0).to(d.dtype).mul_(1.0 - 2.0 * alpha).add_(alpha)
    return torch.maximum(p, q) * torch.exp(-decay * d.abs())
