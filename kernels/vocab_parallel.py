"""`vocab_parallel_divergence`: logits split by vocabulary over the ranks of a group, as tensor parallelism leaves them.

The kernels run on each shard as if it were a whole vocabulary; the chain rule of divergences puts the pieces together.
With P_r, Q_r the mass that p and q give to shard r and p_r, q_r the distributions inside it,
    KL(p‖q) = Σ_r P_r·KL(p_r‖q_r) + KL(P‖Q),      H(p) = Σ_r P_r·H(p_r) + H(P),
    D_α(p‖q) = Σ_r P_r^α Q_r^(1−α)·D_α(p_r‖q_r) + D_α(P‖Q):
exact, and every term ≥ 0. One all-gather of ten numbers per token carries them; every rank merges in rank order, so the
results are the same bits everywhere. JSD, skew KLs and total variation mix p and q after normalising, so they need the
global normalisers first: a second all-gather of two numbers per token. The backward pass communicates nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dense import as_rows, check_logits, check_tokens, check_weights, choose_path
from .kinds import BASE_STATS, TOKEN_STATS, DivergenceOutput, Spec, make_spec
from .ops import backend
from .terms import loss_terms

_CHAIN = ("forward_kl", "reverse_kl", "alpha")  # kinds that one gather determines
_STATS = BASE_STATS + TOKEN_STATS


def vocab_parallel_divergence(
    student_shard: Tensor,
    teacher_shard: Tensor,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    weights: Tensor | None = None,
    path: str = "auto",
    stats: bool = False,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    token_ids: Tensor | None = None,
    beta: float = 0.5,
    alpha: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> DivergenceOutput:
    """As `divergence`, from shards of the vocabulary; differentiable in this rank's shard. A collective call.

    Args:
        student_shard, teacher_shard: `[..., V_r]`, the same ids on both; V_r ≥ 1 may differ between ranks. Mask padding
            columns with −inf on both sides. Every token needs a finite logit in every shard, on both sides.
        group: the ranks that hold the shards; None for the default group. All tokens, weights and options must agree.
        vocab_start: global id of this shard's first column; needed with `token_ids` (global ids).
        others: as in `divergence`; top-k statistics are not computed across shards.

    Returns:
        `DivergenceOutput`, bit-identical on all ranks.
    """
    check_logits(student_shard, teacher_shard)
    if student_shard.shape[-1] != teacher_shard.shape[-1]:
        raise ValueError(
            f"this rank's shards must hold the same ids: student {student_shard.shape[-1]} columns, "
            f"teacher {teacher_shard.shape[-1]}; cut or pad the shards alike"
        )
    if token_ids is not None and vocab_start is None:
        raise ValueError("token_ids are global ids: vocab_start (the id of this shard's first column) is needed")
    spec = make_spec(
        kind,
        beta=beta,
        alpha=alpha,
        temperature=temperature,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
    )
    lead = student_shard.shape[:-1]
    chosen = choose_path(path, student_shard, teacher_shard)
    scaled = None if weights is None else check_weights(weights, lead, student_shard)
    valid = None if scaled is None else scaled.detach().reshape(-1) != 0
    tokens = None
    if token_ids is not None:
        tokens = check_tokens(token_ids, lead, student_shard).reshape(-1)
    call = _Call(spec, chosen, group, valid, tokens, vocab_start or 0)
    loss, rows = _VocabParallel.apply(as_rows(student_shard), as_rows(teacher_shard.detach()), call)
    loss = loss.reshape(lead)
    if scaled is not None:
        loss = loss * scaled
    names = () if not stats else _STATS if tokens is not None else BASE_STATS
    return DivergenceOutput(loss, {name: rows[i].reshape(lead) for i, name in enumerate(names)}, chosen)


@dataclass(frozen=True, slots=True)
class _Call:
    """What one call needs besides the shards."""

    spec: Spec
    path: str
    group: dist.ProcessGroup | None
    valid: Tensor | None
    tokens: Tensor | None
    vocab_start: int


class _VocabParallel(torch.autograd.Function):
    """Opaque to torch.compile (a process group cannot be traced): `vocab_parallel_divergence` breaks the graph."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        parts = _gather(_local_parts(student, teacher, call), call.group)
        loss, saved, stats = _merge(parts, call)
        if call.spec.kind not in _CHAIN:
            sums = backend(call.path).partial_terms(student, teacher, call.valid, saved, call.spec)
            loss, saved[:, 4] = _gather(sums, call.group).sum(0)
        if call.valid is not None:
            loss = loss.masked_fill(~call.valid, 0.0)
            stats = stats.masked_fill(~call.valid, 0.0)
        ctx.call = call
        ctx.save_for_backward(student, teacher, saved)
        ctx.mark_non_differentiable(stats)
        return loss, stats.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, saved = ctx.saved_tensors
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        call = ctx.call
        backend(call.path).backward(grad_loss, student, teacher, saved, call.valid, call.spec, grad)
        return grad, None, None


def _local_parts(student: Tensor, teacher: Tensor, call: _Call) -> Tensor:
    """`[11, N]`: m_s, log z_s, m_t, log z_t in the path's units, the shard's own loss and seven statistics of it."""
    tokens = None if call.tokens is None else call.tokens - call.vocab_start  # other shards' ids: < 0 or ≥ V_r
    kind = call.spec.kind if call.spec.kind in _CHAIN else "forward_kl"
    spec = Spec(kind, *call.spec.numbers())
    n_stats = len(BASE_STATS) + (len(TOKEN_STATS) if tokens is not None else 0)
    loss, saved, stats = backend(call.path).forward(student, teacher, call.valid, tokens, spec, 0, n_stats)
    parts = [saved[:, :4].t(), loss.unsqueeze(0), stats[:4].to(loss), stats[7:8].to(loss)]
    if tokens is not None:
        parts.append(stats[8:10].to(loss).masked_fill(tokens < 0, -torch.inf))
    return torch.cat(parts)


def _gather(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """part `[k, N]` of every rank as `[P, k, N]`, in rank order."""
    ranks = dist.get_world_size(group)
    out = part.new_empty(ranks * part.shape[0], part.shape[1])
    dist.all_gather_into_tensor(out, part.contiguous(), group=group)
    return out.view(ranks, *part.shape)


def _merge(parts: Tensor, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """Loss `[N]`, saved `[N, 5]` and statistics `[S, N]` of the whole vocabulary from `[P, k, N]` parts."""
    spec, unit = call.spec, backend(call.path).units(call.spec)
    ms, log_zs, logq_r = _masses(parts[:, 0], parts[:, 1], unit[0], unit[2])
    mt, log_zt, logp_r = _masses(parts[:, 2], parts[:, 3], unit[1], unit[2])
    q_r, p_r = logq_r.exp(), logp_r.exp()
    d = logp_r - logq_r
    forward_kl = (p_r * parts[:, 5] + loss_terms("forward_kl", 0.0, p_r, q_r, d)).sum(0)
    reverse_kl = (q_r * parts[:, 6] + loss_terms("reverse_kl", 0.0, p_r, q_r, d)).sum(0)
    student_entropy = (q_r * (parts[:, 7] - logq_r)).sum(0)
    teacher_entropy = (p_r * (parts[:, 8] - logp_r)).sum(0)
    first = (parts[:, 0] == ms) & (parts[:, 2] == mt) & (parts[:, 9] > 0)
    rows = [forward_kl, reverse_kl, student_entropy, teacher_entropy, forward_kl + teacher_entropy]
    rows += [(-log_zs * unit[2]).exp(), (-log_zt * unit[2]).exp(), first.any(0).to(forward_kl.dtype)]
    if call.tokens is not None:
        given = call.tokens < 0
        rows += [(parts[:, 10 + i] + log).amax(0).masked_fill(given, 0.0) for i, log in enumerate((logq_r, logp_r))]
    loss, total = forward_kl, torch.zeros_like(forward_kl)
    if spec.kind == "reverse_kl":
        loss = total = reverse_kl
    elif spec.kind == "alpha":
        weight = (spec.mix * logp_r + (1.0 - spec.mix) * logq_r).exp()
        loss = (weight * parts[:, 4] + loss_terms("alpha", spec.mix, p_r, q_r, d)).sum(0)
        total = (1.0 - spec.mix) * loss
    return loss, torch.stack((ms, log_zs, mt, log_zt, total), 1), torch.stack(rows)


def _masses(m: Tensor, log_z: Tensor, m_unit: float, z_unit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Global (m, log z) `[N]` in the path's units and the log of every shard's mass `[P, N]` in nats."""
    top = m.amax(0)
    log_mass = (m - top) * m_unit + log_z * z_unit
    log_total = log_mass.logsumexp(0)
    return top, log_total / z_unit, log_mass - log_total
