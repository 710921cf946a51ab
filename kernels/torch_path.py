"""The torch path: any device, bounded memory, and the definition that the Triton path is held to.

Rows are processed in chunks of `chunk_elements(device)` logits, in fp32 (fp64 for fp64 inputs): two sweeps over a chunk
while it is in cache. The forward pass saves five numbers per token, (m_s, log z_s, m_t, log z_t, G) with m the maximum
of the values of `load`, z = Σ e^{(x−m)·factor} and G of `terms.py`; the backward pass forms the rest again from the
logits and the true upstream gradient.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import terms
from .kinds import Spec

SAVED = 5
_EXCLUDED = -1e30  # nats: the log-probability of an id with logit −inf


def chunk_elements(device: torch.device) -> int:
    """Logits per chunk: a chunk's dozen fp32 temporaries stay near the cache on CPU, and fill the device elsewhere."""
    return 2**16 if device.type == "cpu" else 2**25


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 where any input is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def forward(
    student: Tensor, teacher: Tensor, valid: Tensor | None, tokens: Tensor | None, spec: Spec, top_k: int, n_stats: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss `[N]`, saved `[N, 5]` and statistics `[n_stats, N]` (rows of `kinds.stat_names`; none for n_stats = 0).

    Args:
        student, teacher: `[B, T, V_s]`, `[B, T, V_t]` raw logits, unit stride in V; N = B·T; V = min(V_s, V_t).
        valid: bool `[N]`; tokens that are not valid get 0 everywhere and their logits are not read.
        tokens: int64 `[N]`, for the two statistics of `kinds.TOKEN_STATS`.
    """
    dtype = accumulation_dtype(student, teacher)
    count = student.shape[0] * student.shape[1]
    shared = min(student.shape[-1], teacher.shape[-1])
    loss = student.new_zeros(count, dtype=dtype)
    saved = student.new_zeros(count, SAVED, dtype=dtype)
    stats = student.new_zeros(n_stats, count, dtype=torch.float32)
    for rows in row_chunks(student, teacher, valid):
        s, _ = load(student, rows, shared, spec.student_scale, spec.student_softcap, dtype)
        t, _ = load(teacher, rows, shared, spec.teacher_scale, spec.teacher_softcap, dtype)
        norms, logq, logp, d = _normalise(s, t, spec)
        q, p = logq.exp(), logp.exp()
        row_loss, total = terms.loss_and_sum(spec.kind, spec.mix, p, q, d)
        row_loss = _divergence_value(row_loss)
        loss[rows] = row_loss
        saved[rows, :4] = norms
        saved[rows, 4] = total
        if n_stats:
            ids = None if tokens is None else tokens[rows]
            stats[:, rows] = _statistics(spec.kind, row_loss, logp, logq, p, q, d, top_k, ids).float()
    return loss, saved, stats


def backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, saved: Tensor, valid: Tensor | None, spec: Spec, out: Tensor
) -> None:
    """Writes ∂(Σ grad_loss·loss)/∂student into `out` (shape of student; may be student itself)."""
    dtype = saved.dtype
    shared = min(student.shape[-1], teacher.shape[-1])
    if valid is not None:
        _fill_rows(out, ~valid, 0)
    out[..., shared:] = 0
    for rows in row_chunks(student, teacher, valid):
        q, p, d, slope = _probabilities(student, teacher, rows, saved, spec)
        total = saved[rows, 4:]
        grad = terms.gradient_terms(spec.kind, spec.mix, p, q, d).addcmul_(q, total, value=-1)
        grad.mul_(grad_loss[rows].to(dtype).unsqueeze(-1))
        store(out, rows, scale_gradient(grad, slope, spec.student_scale, spec.temperature))


def partial_terms(student: Tensor, teacher: Tensor, valid: Tensor | None, saved: Tensor, spec: Spec) -> Tensor:
    """(Σ f_k, Σ g_k) `[2, N]` over this shard of the vocabulary, for the normalisers in `saved` `[N, 5]`."""
    out = saved.new_zeros(2, saved.shape[0])
    for rows in row_chunks(student, teacher, valid):
        q, p, d, _ = _probabilities(student, teacher, rows, saved, spec)
        out[0, rows], out[1, rows] = terms.loss_and_sum(spec.kind, spec.mix, p, q, d)
    return out


def units(spec: Spec) -> tuple[float, float, float]:
    """Nats per unit of the saved m_s, m_t and log z."""
    c_s = factor(spec.student_scale, spec.student_softcap, spec.temperature)
    return c_s, factor(spec.teacher_scale, spec.teacher_softcap, spec.temperature), 1.0


def row_chunks(student: Tensor, teacher: Tensor | None, valid: Tensor | None) -> Iterator[slice | Tensor]:
    """Chunks of flat row numbers: slices when every row counts, index tensors when `valid` leaves some out."""
    count = student.shape[0] * student.shape[1]
    width = student.shape[-1] if teacher is None else min(student.shape[-1], teacher.shape[-1])
    step = max(1, chunk_elements(student.device) // max(1, width))
    if valid is None:
        yield from (slice(lo, min(lo + step, count)) for lo in range(0, count, step))
    else:
        yield from valid.nonzero().squeeze(1).split(step) if width else ()


def load(
    logits: Tensor, rows: slice | Tensor, width: int, scale: float, softcap: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """A fresh `[R, width]` copy of rows: raw logits, or x → c·tanh(scale·x/c); and 1 − tanh², None without a softcap.

    Scale (without a softcap) and temperature are applied after the maximum is subtracted, see `factor`: at ±1e4 the other
    order would round away the digits that matter.
    """
    x = _take(logits, rows)[:, :width].to(dtype, copy=True)
    if not softcap:
        return x, None
    x.mul_(scale / softcap).tanh_()
    slope = x.square().neg_().add_(1.0)
    return x.mul_(softcap), slope


def factor(scale: float, softcap: float, temperature: float) -> float:
    """From the values of `load` to nats."""
    return (1.0 if softcap else scale) / temperature


def scale_gradient(grad: Tensor, slope: Tensor | None, scale: float, temperature: float) -> Tensor:
    """∂/∂(raw logits) from ∂/∂(nats), in place."""
    if slope is not None:
        grad.mul_(slope)
    return grad if scale == temperature else grad.mul_(scale / temperature)


def store(out: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    """Writes `[R, V']` values to flat rows of `out` `[B, T, V]`, V' ≤ V, in out's dtype."""
    flat = _flat_view(out)
    if flat is not None:
        flat[rows, : values.shape[1]] = values.to(out.dtype)
    else:
        index = _row_numbers(rows, out.device)
        steps = out.shape[1]
        out[index // steps, index % steps, : values.shape[1]] = values.to(out.dtype)


def _fill_rows(out: Tensor, which: Tensor, value: float) -> None:
    out.masked_fill_(which.view(out.shape[0], out.shape[1], 1), value)


def _take(logits: Tensor, rows: slice | Tensor) -> Tensor:
    flat = _flat_view(logits)
    if flat is not None:
        return flat[rows]
    index = _row_numbers(rows, logits.device)
    return logits[index // logits.shape[1], index % logits.shape[1]]


def _flat_view(x: Tensor) -> Tensor | None:
    """`[B·T, V]` without a copy, or None where the strides do not allow it (a shifted `logits[:, :-1]`)."""
    b, t, v = x.shape
    if b > 1 and t > 1 and x.stride(0) != t * x.stride(1):
        return None
    return x.as_strided((b * t, v), (x.stride(1) if t > 1 else x.stride(0), x.stride(2)))


def _row_numbers(rows: slice | Tensor, device: torch.device) -> Tensor:
    return torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows


def _normalise(s: Tensor, t: Tensor, spec: Spec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """norms `[R, 4]`, log q, log p, d = log p − log q from the values of `load`, which are overwritten."""
    ms, mt = s.amax(-1, keepdim=True), t.amax(-1, keepdim=True)
    _to_nats(s, ms, t, mt, spec)
    log_zs, log_zt = s.exp().sum(-1, keepdim=True).log_(), t.exp().sum(-1, keepdim=True).log_()
    d = _log_ratio(s, t, log_zs, log_zt)
    return torch.cat((ms, log_zs, mt, log_zt), -1), s.sub_(log_zs), t.sub_(log_zt), d


def _probabilities(
    student: Tensor, teacher: Tensor, rows: slice | Tensor, saved: Tensor, spec: Spec
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, p, d of the rows from saved normalisers, and the slope of the student's softcap."""
    shared = min(student.shape[-1], teacher.shape[-1])
    s, slope = load(student, rows, shared, spec.student_scale, spec.student_softcap, saved.dtype)
    t, _ = load(teacher, rows, shared, spec.teacher_scale, spec.teacher_softcap, saved.dtype)
    ms, log_zs, mt, log_zt, _ = saved[rows].unsqueeze(-1).unbind(1)
    _to_nats(s, ms, t, mt, spec)
    d = _log_ratio(s, t, log_zs, log_zt)
    return s.sub_(log_zs).exp_(), t.sub_(log_zt).exp_(), d, slope


def _to_nats(s: Tensor, ms: Tensor, t: Tensor, mt: Tensor, spec: Spec) -> None:
    """(x − m)·factor in place; an excluded id (−inf) becomes −1e30, so that 0·log 0 is 0 and −inf − (−inf) is 0."""
    c_s, c_t, _ = units(spec)
    for x, m, c in ((s, ms, c_s), (t, mt, c_t)):
        x.sub_(m).clamp_min_(_EXCLUDED)
        if c != 1.0:
            x.mul_(c)


def _log_ratio(s: Tensor, t: Tensor, log_zs: Tensor, log_zt: Tensor) -> Tensor:
    """log p − log q from shifted values in nats: the difference of values first, so that equal inputs give exactly 0."""
    return (t - s).sub_(log_zt - log_zs)


def _divergence_value(terms_sum: Tensor) -> Tensor:
    """≥ 0, and +inf where the sum has met an id that the other side excludes."""
    return terms_sum.clamp_min_(0.0).masked_fill_(terms_sum > -1e-10 * _EXCLUDED, torch.inf)


def _statistics(
    kind: str, loss: Tensor, logp: Tensor, logq: Tensor, p: Tensor, q: Tensor, d: Tensor, top_k: int, ids: Tensor | None
) -> Tensor:
    """`[n_stats, R]` in the order of `kinds.stat_names`."""
    forward_kl = loss if kind == "forward_kl" else _kl(p, q, d)
    reverse_kl = loss if kind == "reverse_kl" else _kl(q, p, -d)
    student_entropy, teacher_entropy = _entropy(q, logq), _entropy(p, logp)
    q_max, p_max = q.amax(-1), p.amax(-1)
    first_on_both = (logq == logq.amax(-1, keepdim=True)) & (logp == logp.amax(-1, keepdim=True))
    rows = [forward_kl, reverse_kl, student_entropy, teacher_entropy, forward_kl + teacher_entropy, q_max, p_max]
    rows.append(first_on_both.any(-1).to(loss.dtype))
    if top_k:
        rows += _topk_statistics(logq, logp, min(top_k, q.shape[1]))
    if ids is not None:
        chosen = (token_values(x, ids.unsqueeze(1)).squeeze(1) for x in (logq, logp))
        rows += [x.masked_fill(x < 0.1 * _EXCLUDED, -torch.inf) for x in chosen]
    return torch.stack(rows)


def _kl(a: Tensor, b: Tensor, log_ratio: Tensor) -> Tensor:
    return _divergence_value(terms.weighted_phi(a, b, log_ratio).sum(-1))


def _topk_statistics(logq: Tensor, logp: Tensor, k: int) -> list[Tensor]:
    q_top, q_ids = logq.topk(k, sorted=False)
    p_top, p_ids = logp.topk(k, sorted=False)
    shared = (q_ids.unsqueeze(-1) == p_ids.unsqueeze(-2)).sum((-1, -2)).to(logq.dtype) / k
    return [shared, *(_entropy(top.exp(), top) for top in (q_top.log_softmax(-1), p_top.log_softmax(-1)))]


def token_values(log_probs: Tensor, ids: Tensor) -> Tensor:
    """log_probs `[R, V]` at ids `[R, K]`; 0 where the id is negative, −inf where it lies beyond V."""
    values = log_probs.gather(-1, ids.clamp(0, log_probs.shape[-1] - 1))
    return values.masked_fill(ids >= log_probs.shape[-1], -torch.inf).masked_fill(ids < 0, 0.0)


def _entropy(p: Tensor, logp: Tensor) -> Tensor:
    return -(p * logp).sum(-1)
