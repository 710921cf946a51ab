"""The fp64 oracle: every divergence and statistic from its textbook definition, by autograd, with nothing clever in it.

Slow and memory hungry on purpose: it exists to be read and to be compared with. Public, because whoever writes another
kernel needs it too:

    loss, stats = divergence_oracle(student_logits, teacher_logits, "jsd", beta=0.3)
    loss.sum().backward()        # the reference gradient
"""

import torch
from torch import Tensor

from .kinds import Spec, make_spec


def divergence_oracle(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    *,
    token_ids: Tensor | None = None,
    top_k: int = 0,
    **parameters: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics in fp64, of the leading shape of the inputs, differentiable in the student's logits.

    Args:
        student_logits, teacher_logits: `[..., V_s]`, `[..., V_t]`, any float dtype; exactly converted to fp64.
        kind, temperature, token_ids, top_k, parameters: as in `divergence` (`beta`, `alpha`, scales, softcaps).
    """
    spec = make_spec(kind, temperature=temperature, **parameters)
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    logq = _log_probs(student_logits[..., :shared], spec.student_scale, spec.student_softcap, temperature)
    logp = _log_probs(teacher_logits[..., :shared].detach(), spec.teacher_scale, spec.teacher_softcap, temperature)
    return _loss(spec, logp, logq), _statistics(logp.detach(), logq.detach(), token_ids, top_k)


def _log_probs(logits: Tensor, scale: float, softcap: float, temperature: float) -> Tensor:
    x = logits.double() * scale
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    return (x / temperature).log_softmax(-1)


def _loss(spec: Spec, logp: Tensor, logq: Tensor) -> Tensor:
    p, q, a = logp.exp(), logq.exp(), spec.mix
    if spec.kind == "forward_kl":
        return _kl(logp, logq)
    if spec.kind == "reverse_kl":
        return _kl(logq, logp)
    if spec.kind == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    if spec.kind == "alpha":
        return (1 - (a * logp + (1 - a) * logq).exp().sum(-1)) / (a * (1 - a))
    log_mixture = (a * p + (1 - a) * q).clamp_min(1e-300).log()  # ids that both sides exclude weigh nothing
    if spec.kind == "skew_kl":
        return _kl(logp, log_mixture)
    if spec.kind == "skew_reverse_kl":
        return _kl(logq, log_mixture)
    return a * _kl(logp, log_mixture) + (1 - a) * _kl(logq, log_mixture)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Σ a·(log a − log b), with 0·log 0 = 0."""
    inside = log_a > -torch.inf
    difference = torch.where(inside, log_a, 0.0) - torch.where(inside, log_b, 0.0)
    return (log_a.exp() * difference).sum(-1)


def _statistics(logp: Tensor, logq: Tensor, token_ids: Tensor | None, top_k: int) -> dict[str, Tensor]:
    zero = torch.zeros_like(logp)
    stats = {
        "forward_kl": _kl(logp, logq),
        "reverse_kl": _kl(logq, logp),
        "student_entropy": -_kl(logq, zero),
        "teacher_entropy": -_kl(logp, zero),
        "cross_entropy": _kl(logp, logq) - _kl(logp, zero),
        "student_max_prob": logq.amax(-1).exp(),
        "teacher_max_prob": logp.amax(-1).exp(),
        "top1_agreement": ((logq == logq.amax(-1, True)) & (logp == logp.amax(-1, True))).any(-1).double(),
    }
    if top_k:
        k = min(top_k, logp.shape[-1])
        q_top, q_ids = logq.sort(dim=-1, descending=True, stable=True)
        p_top, p_ids = logp.sort(dim=-1, descending=True, stable=True)
        both = (q_ids[..., :k, None] == p_ids[..., None, :k]).any(-1)
        stats["topk_agreement"] = both.double().mean(-1)
        for name, top in (("student_topk_entropy", q_top), ("teacher_topk_entropy", p_top)):
            renormalised = top[..., :k].log_softmax(-1)
            stats[name] = -_kl(renormalised, torch.zeros_like(renormalised))
    if token_ids is not None:
        for name, values in (("student_logprob", logq), ("teacher_logprob", logp)):
            chosen = values.gather(-1, token_ids.clamp_min(0).unsqueeze(-1)).squeeze(-1)
            stats[name] = chosen.masked_fill(token_ids < 0, 0.0)
    return stats
