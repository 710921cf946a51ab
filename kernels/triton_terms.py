"""Elementwise terms of every divergence in Triton: the counterpart of `terms.py`, in log2 units.

a_s = log2 q, a_t = log2 p. All exponentials are of −|d|, d = a_t − a_s, so nothing overflows, and every term is exactly 0
where a_s = a_t. With the larger of p and q at hand, the smaller is larger·w, w = 2^−|d|, and for the mixture
log2(M/larger) = log2(1 + k·(w − 1)) with k the weight of the smaller in M: three special-function calls for JSD.
Compared with `terms.py` the series for small d are left out: sums carry an absolute error near 1e-7.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN201

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_LN2 = tl.constexpr(0.6931471805599453)
_BIG = tl.constexpr(1e30)


@triton.jit
def fast_log2(x):
    """log2 in one instruction (absolute error 2^-22 near 1, exact at 1); the library's takes thirty."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def pair(a_s, a_t):
    """(larger of p and q, w = smaller/larger, |d|, p > q)."""
    gap = tl.abs(a_t - a_s)
    return tl.exp2(tl.maximum(a_s, a_t)), tl.exp2(-gap), gap, a_t > a_s


@triton.jit
def mixture(mix, a_s, a_t):
    """(log2(M/p), log2(M/q)) of M = mix·p + (1 − mix)·q."""
    gap = tl.abs(a_t - a_s)
    share = tl.where(a_t > a_s, 1.0 - mix, mix)
    low = fast_log2(1.0 + share * (tl.exp2(-gap) - 1.0))
    return low + tl.maximum(a_s - a_t, 0.0), low + tl.maximum(a_t - a_s, 0.0)


@triton.jit
def skew_slope(mix, m_over_a):
    """(1 − mix)·(1 − a/M)."""
    return (1.0 - mix) * (1.0 - tl.exp2(-m_over_a))


@triton.jit
def jsd_terms(mix, a_s, a_t):
    """With k the weight of the smaller: −f/larger = (1−k)·l + k·w·(l + |d|), l = log2(M/larger); g is q's share of f."""
    larger, w, gap, teacher_larger = pair(a_s, a_t)
    share = tl.where(teacher_larger, 1.0 - mix, mix)
    low = fast_log2(1.0 + share * (w - 1.0))
    smaller_part = w * (low + gap)
    f = larger * -_LN2 * ((1.0 - share) * low + share * smaller_part)
    g = larger * (-_LN2 * (1.0 - mix)) * tl.where(teacher_larger, smaller_part, low)
    return f, g


@triton.jit
def loss_and_sum(KIND: tl.constexpr, mix, a_s, a_t):
    """(f_k, g_k): terms of the loss in nats, and of G = Σ q·u (see `terms.py`)."""
    if KIND == "jsd":
        f, g = jsd_terms(mix, a_s, a_t)
    elif KIND == "tvd":
        larger, w, _, teacher_larger = pair(a_s, a_t)
        f = 0.5 * larger * (1.0 - w)
        g = 0.5 * larger * tl.where(w == 1.0, 0.0, tl.where(teacher_larger, -w, 1.0))
    elif KIND == "alpha":
        larger, w, gap, teacher_larger = pair(a_s, a_t)
        weight = tl.where(teacher_larger, mix, 1.0 - mix)  # of the larger in αp + (1−α)q
        geometric = tl.exp2((weight - 1.0) * gap)
        f = larger * (weight * (1.0 - geometric) + (1.0 - weight) * (w - geometric)) / (mix * (1.0 - mix))
        g = (1.0 - mix) * f
    else:
        m_over_p, m_over_q = mixture(mix, a_s, a_t)
        if KIND == "skew_kl":
            f = tl.exp2(a_t) * (-_LN2 * m_over_p)
            g = tl.exp2(a_s) * skew_slope(mix, m_over_p)
        else:
            q = tl.exp2(a_s)
            f = q * (-_LN2 * m_over_q)
            g = f + q * skew_slope(mix, m_over_q)
    return f, g


@triton.jit
def gradient_term(KIND: tl.constexpr, mix, a_s, a_t, total):
    """g_k − q_k·G: the gradient in the student's value, before the factor upstream/T."""
    q = tl.exp2(a_s)
    if KIND == "forward_kl":
        grad = q - tl.exp2(a_t)
    elif KIND == "reverse_kl":
        grad = q * (tl.maximum(a_s - a_t, -_BIG) * _LN2 - total)
    elif KIND == "tvd":
        # w, not d, decides a tie: what the loss cannot tell apart has no slope
        gap = a_t - a_s
        sign = tl.where(tl.exp2(-tl.abs(gap)) == 1.0, 0.0, tl.where(gap > 0, -0.5, 0.5))
        grad = q * (sign - total)
    elif KIND == "alpha":
        gap, weight = tl.abs(a_t - a_s), tl.where(a_t > a_s, mix, 1.0 - mix)
        larger = tl.exp2(tl.maximum(a_s, a_t))
        grad = (q - larger * tl.exp2((weight - 1.0) * gap)) / mix - q * total
    else:
        m_over_p, m_over_q = mixture(mix, a_s, a_t)
        log_q_over_m = -_LN2 * m_over_q
        if KIND == "jsd":
            grad = q * ((1.0 - mix) * log_q_over_m - total)
        elif KIND == "skew_kl":
            grad = q * (skew_slope(mix, m_over_p) - total)
        else:
            grad = q * (log_q_over_m + skew_slope(mix, m_over_q) - total)
    return grad
