"""Elementwise terms of every divergence in torch, written so that nothing cancels when p ≈ q.

With d = log p − log q every kind is Σ_k f_k with f_k ≥ 0, and its gradient is
    ∂L/∂s_k = (g_k − q_k·G) / T,   g_k = q_k·u_k,   G = Σ_k g_k,   u = f'(q/p) up to a constant.
The constant in u is chosen such that u = 0 where p = q, hence loss and gradient are *exactly* 0 for equal inputs, and a
common error in all d (a rounded normaliser) enters the loss only squared. The building block is
    φ(x) = x + expm1(−x) ≥ 0:   KL(p‖q) = Σ p·φ(d)   because Σ (q − p) = 0.
Nothing overflows: exponentials are taken of −|d| only. Ids that one side excludes have |d| near 1e30 and p or q = 0.

Written for speed, too: in the cache a product costs 0.1 ns an element, expm1 0.8, and `torch.where` up to 4, because it
branches; a choice is made by a mask of zeros and ones instead, of finite values only.
"""

import math

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
        return _difference(p, q, d).abs_().mul_(0.5)
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
        return q - p  # p ≈ q: as exact as with `_difference`, because d itself is known to rounding only
    if kind == "reverse_kl":
        return (q * d).neg_()
    if kind == "tvd":
        return d.sign().mul_(q).mul_(-0.5)
    if kind == "alpha":
        # q·(1 − (p/q)^α)/α; for p > q written as g·(e^{−αd} − 1) with g = p^α q^{1−α} so that no ratio overflows
        small = d.abs().mul_(-mix).expm1_()
        scale = torch.lerp(-q, _geometric(mix, p, q, d), _mask(d, 0.0))
        return small.mul_(scale).div_(mix)
    if kind == "jsd":
        _, log_m_over_larger, _ = _mixture(mix, d)
        return log_m_over_larger.add_(d.clamp_min(0)).mul_(q).mul_(mix - 1.0)
    m_over_p, m_over_q = _log_mixture_ratios(mix, d)
    m = mix * p + (1.0 - mix) * q
    if kind == "skew_kl":
        # q·(1−mix)·(1 − p/M): with r = M/p, 1 − 1/r = −expm1(−log r), and q/M = e^{−log(M/q)} ≤ 1/(1−mix)
        return m_over_q.neg_().exp_().mul_(_excess(m, p, m_over_p)).mul_(1.0 - mix)
    slope = _excess(m, q, m_over_q).mul_((-m_over_q).exp_()).mul_(1.0 - mix)
    return slope.sub_(m_over_q.mul_(q))


def loss_and_sum(kind: str, mix: float, p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ_k f_k, G = Σ_k g_k) of each row, `[R]` each; G from the loss where an identity gives it more exactly."""
    if kind == "jsd":
        return _jsd_loss_and_sum(mix, p, q, d)
    loss = loss_terms(kind, mix, p, q, d).sum(-1)
    if kind == "forward_kl":
        return loss, torch.zeros_like(loss)
    if kind in ("reverse_kl", "alpha"):
        return loss, loss if kind == "reverse_kl" else (1.0 - mix) * loss
    return loss, gradient_terms(kind, mix, p, q, d).sum(-1)


def weighted_phi(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """a·φ(x) = a·x + b − a where b = a·e^{−x}; relative error near 2·eps/|x| for small x, which averages out in a sum."""
    near = x.clamp_min(-1.0)
    far = _mask(near, x)  # where e^{−x} might overflow, b has it already: a·(x + e − 1) + (b − a·e)
    return near.neg_().expm1_().add_(x).mul_(a).addcmul_(far, torch.sub(b, a, alpha=math.e))


def _difference(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p − q, exact to rounding when p ≈ q: max(p, q)·(1 − e^{−|d|}) with the sign of d."""
    return d.abs().neg_().expm1_().mul_(torch.maximum(p, q)).mul_(d.sign().neg_())


def _jsd_loss_and_sum(mix: float, p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """`loss_and_sum` of the JSD: f = −larger·(l + k·((1 + E)·|d| + E·l)), first order in l and d cancelling as it must.

    With E = e^{−|d|} − 1 (the smaller of p and q over the larger, less 1), k the weight of the smaller in M, and
    l = log(M/larger). G = (1−mix)·Σ q·log(q/M), which is not taken from f: a common error in all d must be the same in G
    as in `gradient_terms`, where it cancels.
    """
    share, log_m_over_larger, small = _mixture(mix, d)
    total = d.clamp_min(0).add_(log_m_over_larger).mul_(q).sum(-1).mul_(mix - 1.0)
    bracket = (small + 1.0).mul_(d.abs()).addcmul_(small, log_m_over_larger).mul_(share).add_(log_m_over_larger)
    return bracket.mul_(torch.maximum(p, q)).sum(-1).neg_(), total


def _mixture(mix: float, d: Tensor) -> tuple[Tensor | float, Tensor, Tensor]:
    """(weight k of the smaller of p and q in M, log(M/larger) = log(1 + k·E), E = e^{−|d|} − 1)."""
    small = d.abs().neg_().expm1_()
    if mix == 0.5:
        return 0.5, (0.5 * small).log1p_(), small
    share = _mask(d, 0.0).mul_(1.0 - 2.0 * mix).add_(mix)
    return share, (share * small).log1p_(), small


def _log_mixture_ratios(mix: float, d: Tensor) -> tuple[Tensor, Tensor]:
    """log(M/p) and log(M/q) for M = mix·p + (1−mix)·q; near 1e30 where p (or q) is 0."""
    _, log_m_over_larger, _ = _mixture(mix, d)
    return (-d).clamp_min_(0).add_(log_m_over_larger), d.clamp_min(0).add_(log_m_over_larger)


def _excess(m: Tensor, a: Tensor, log_m_over_a: Tensor) -> Tensor:
    """M − a, exact to rounding when they are close."""
    near = log_m_over_a.clamp(-0.5, 0.5).expm1_().mul_(a)
    return near.lerp_(m - a, _mask(log_m_over_a.abs(), 0.5))


def _alpha_terms(alpha: float, p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """[αp + (1−α)q − p^α q^{1−α}]/(α(1−α)) = p·[(1−α)φ(d) − φ((1−α)d)]/(α(1−α)) ≥ 0."""
    geometric = _geometric(alpha, p, q, d)
    near = weighted_phi(p, q, d).mul_(1.0 - alpha).sub_(weighted_phi(p, geometric, (1.0 - alpha) * d))
    far = torch.lerp(q, p, alpha).sub_(geometric)
    return near.lerp_(far, _mask(d.abs(), 0.5)).div_(alpha * (1.0 - alpha))


def _geometric(alpha: float, p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p^α q^{1−α} from the larger of the two: the smaller may have underflowed where its power has not."""
    decay = _mask(d, 0.0).mul_(2.0 * alpha - 1.0).sub_(alpha)
    return decay.mul_(d.abs()).exp_().mul_(torch.maximum(p, q))


def _mask(x: Tensor, limit: float | Tensor) -> Tensor:
    """1 where x > limit, else 0, in the dtype of x."""
    return torch.gt(x, limit, out=torch.empty_like(x))
