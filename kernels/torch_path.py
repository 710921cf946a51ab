"""The torch path: any device, bounded memory, and the definition that the Triton path is held to.

Rows are processed in chunks of `chunk_elements(device)` logits, in fp32 (fp64 for fp64 inputs): two sweeps over a chunk
while it is in cache. The forward pass saves five numbers per token, (m_s, log z_s, m_t, log z_t, G) with m the maximum
of the values of `load`, z = Σ e^{(x−m)·factor} and G of `terms.py`; the backward pass forms the rest again from the
logits and the true upstream gradient.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import terms
from .kinds import Spec

SAVED = 5
_EXCLUDED = -1e30  # nats: the log-probability of an id with logit −inf
_LOG2E = math.log2(math.e)


def chunk_elements(device: torch.device) -> int:
    """Logits per chunk: a chunk's dozen fp32 temporaries stay near the cache on CPU, and fill the device elsewhere."""
    return 2**17 if device.type == "cpu" else 2**25


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
        c_s, c_t, _ = units(spec)
        of_student, of_teacher = _normalise(s, c_s), _normalise(t, c_t)
        d = _log_ratio(of_student, of_teacher)
        row_loss, total = terms.loss_and_sum(spec.kind, spec.mix, of_teacher.probs, of_student.probs, d)
        row_loss = _divergence_value(row_loss)
        loss[rows] = row_loss
        saved[rows] = torch.cat(
            (of_student.top, of_student.log_z, of_teacher.top, of_teacher.log_z, total.unsqueeze(-1)), -1
        )
        if n_stats:
            ids = None if tokens is None else tokens[rows]
            stats[:, rows] = _statistics(spec.kind, row_loss, of_student, of_teacher, d, top_k, ids).float()
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
    """Rows `[R, width]` in `dtype`: raw logits (perhaps a view: read only), or x → c·tanh(scale·x/c); and 1 − tanh², None
    without a softcap.

    Scale (without a softcap) and temperature are applied after the maximum is subtracted, see `factor`: at ±1e4 the other
    order would round away the digits that matter.
    """
    x = _take(logits, rows)[:, :width].to(dtype)
    if not softcap:
        return x, None
    x = x.mul(scale / softcap).tanh_()
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


@dataclass(slots=True)
class _Side:
    """One model's rows: maximum of the values of `load` `[R, 1]`, values above it in nats (≤ 0) and probabilities `[R, V]`,
    log z `[R, 1]`."""

    top: Tensor
    nats: Tensor
    probs: Tensor
    log_z: Tensor

    def log_probs(self) -> Tensor:
        return self.nats - self.log_z


def _normalise(x: Tensor, unit: float) -> _Side:
    """From the values of `load`; `unit` nats each."""
    top = x.amax(-1, keepdim=True)
    nats = _to_nats(x, top, unit)
    probs = exponential(nats)
    z = probs.sum(-1, keepdim=True)
    return _Side(top, nats, probs.mul_(z.reciprocal()), z.log())


def _probabilities(
    student: Tensor, teacher: Tensor, rows: slice | Tensor, saved: Tensor, spec: Spec
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, p, d of the rows from saved normalisers, and the slope of the student's softcap."""
    shared = min(student.shape[-1], teacher.shape[-1])
    s, slope = load(student, rows, shared, spec.student_scale, spec.student_softcap, saved.dtype)
    t, _ = load(teacher, rows, shared, spec.teacher_scale, spec.teacher_softcap, saved.dtype)
    ms, log_zs, mt, log_zt, _ = saved[rows].unsqueeze(-1).unbind(1)
    c_s, c_t, _ = units(spec)
    s, t = _to_nats(s, ms, c_s), _to_nats(t, mt, c_t)
    d = (t - s).sub_(log_zt - log_zs)
    return _scaled_exponential(s, log_zs), _scaled_exponential(t, log_zt), d, slope


def exponential(nats: Tensor) -> Tensor:
    """e^x, fresh; exp2 is several times faster than exp where exp goes through a vector library, and as exact here."""
    return (nats * _LOG2E).exp2_()


def _scaled_exponential(nats: Tensor, log_z: Tensor) -> Tensor:
    """e^x / z, in place."""
    return nats.mul_(_LOG2E).exp2_().mul_((-log_z).exp_())


def _to_nats(x: Tensor, top: Tensor, unit: float) -> Tensor:
    """(x − top)·unit, fresh; an excluded id (−inf) becomes −1e30, so that 0·log 0 is 0 and −inf − (−inf) is 0."""
    x = (x - top).clamp_min_(_EXCLUDED)
    return x if unit == 1.0 else x.mul_(unit)


def _log_ratio(of_student: _Side, of_teacher: _Side) -> Tensor:
    """log p − log q: the difference of values first, so that equal inputs give exactly 0."""
    return (of_teacher.nats - of_student.nats).sub_(of_teacher.log_z - of_student.log_z)


def _divergence_value(terms_sum: Tensor) -> Tensor:
    """≥ 0, and +inf where the sum has met an id that the other side excludes."""
    return terms_sum.clamp_min_(0.0).masked_fill_(terms_sum > -1e-10 * _EXCLUDED, torch.inf)


def _statistics(
    kind: str, loss: Tensor, of_student: _Side, of_teacher: _Side, d: Tensor, top_k: int, ids: Tensor | None
) -> Tensor:
    """`[n_stats, R]` in the order of `kinds.stat_names`."""
    q, p = of_student.probs, of_teacher.probs
    forward_kl = loss if kind == "forward_kl" else _kl(p, q, d)
    reverse_kl = loss if kind == "reverse_kl" else _kl(q, p, -d)
    student_entropy, teacher_entropy = _entropy(of_student), _entropy(of_teacher)
    first_on_both = (of_student.nats + of_teacher.nats).amax(-1) == 0  # values are ≤ 0, and 0 at the first
    rows = [forward_kl, reverse_kl, student_entropy, teacher_entropy, forward_kl + teacher_entropy]
    rows += [(-side.log_z.squeeze(-1)).exp() for side in (of_student, of_teacher)]
    rows.append(first_on_both.to(loss.dtype))
    if top_k:
        rows += _topk_statistics(of_student.nats, of_teacher.nats, min(top_k, q.shape[1]))
    if ids is not None:
        for side in (of_student, of_teacher):
            chosen = token_values(side.nats, ids.unsqueeze(1)).squeeze(1) - side.log_z.squeeze(1).masked_fill(
                ids < 0, 0
            )
            rows.append(chosen.masked_fill(chosen < 0.1 * _EXCLUDED, -torch.inf))
    return torch.stack(rows)


def _kl(a: Tensor, b: Tensor, log_ratio: Tensor) -> Tensor:
    return _divergence_value(terms.weighted_phi(a, b, log_ratio).sum(-1))


def _topk_statistics(student: Tensor, teacher: Tensor, k: int) -> list[Tensor]:
    (q_top, q_ids), (p_top, p_ids) = _topk(student, k), _topk(teacher, k)
    shared = (q_ids.unsqueeze(-1) == p_ids.unsqueeze(-2)).sum((-1, -2)).to(student.dtype) / k
    log_probs = (top.log_softmax(-1) for top in (q_top, p_top))
    return [shared, *(-x.exp().mul_(x).sum(-1) for x in log_probs)]


def _topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`values.topk(k)` in no order. On CPU it sorts a heap of k where 64·k ≤ V, else partitions the row, several times slower."""
    missing = 64 * k - values.shape[1]
    if values.device.type == "cpu" and 0 < missing <= values.shape[1]:
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    found = values.topk(k, sorted=False)
    return found.values, found.indices


def token_values(log_probs: Tensor, ids: Tensor) -> Tensor:
    """log_probs `[R, V]` at ids `[R, K]`; 0 where the id is negative, −inf where it lies beyond V."""
    values = log_probs.gather(-1, ids.clamp(0, log_probs.shape[-1] - 1))
    return values.masked_fill(ids >= log_probs.shape[-1], -torch.inf).masked_fill(ids < 0, 0.0)


def _entropy(side: _Side) -> Tensor:
    return side.log_z.squeeze(-1) - (side.probs * side.nats).sum(-1)
