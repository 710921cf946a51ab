"""Teachers that are known only in part: top-k log-probabilities with a tail, or the sampled token alone.

`sparse_divergence` compares two distributions over K + 1 outcomes: the teacher's K ids and "anything else". It needs no
kernel of its own: log q at the ids and of the rest come from `token_logprobs` (two sweeps over the student's logits in
all), and a divergence over K + 1 outcomes is `divergence` itself, with every kind and every statistic. Coarsening can
only lower an f-divergence, so the result is a lower bound of the full one, equal to it when the tail is empty or
proportional.

`sampled_reverse_kl` is the policy-gradient form: y ~ q, only log p(y) known.
"""

import torch
from torch import Tensor

from .dense import check_tokens, check_weights, choose_path, divergence
from .kinds import DivergenceOutput
from .linear_tokens import LinearLogits
from .tokens import token_logprobs

TAILS = ("bucket", "renormalise")


def sparse_divergence(
    student_logits: Tensor | LinearLogits,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    weights: Tensor | None = None,
    path: str = "auto",
    stats: bool = False,
    *,
    tail: str = "bucket",
    beta: float = 0.5,
    alpha: float | None = None,
    student_scale: float = 1.0,
    student_softcap: float | None = None,
) -> DivergenceOutput:
    """Divergence from a teacher given by its K most probable ids; differentiable in the student's logits.

    Args:
        student_logits: `[..., V]`, as in `divergence`, or `LinearLogits`.
        teacher_ids: `[..., K]` integers, distinct within a token; negative ids are padding, and ids that the student does
            not have count as left over.
        teacher_logprobs: `[..., K]` natural log-probabilities under the full vocabulary, at the same temperature as
            the student is compared at (they cannot be tempered here: the tail is unknown).
        tail: "bucket" adds one outcome with the mass left over on both sides; "renormalise" restricts both to the ids.
        others: as in `divergence`. Statistics are those of the K + 1 (or K) outcomes; top-k statistics are left out.

    Raises:
        ValueError: an unknown tail, kind or path, or shapes that do not fit.
    """
    lead = student_logits.shape[:-1]
    if tail not in TAILS:
        raise ValueError(f"unknown tail {tail!r}; choose one of {', '.join(TAILS)}")
    if teacher_ids.shape != teacher_logprobs.shape or teacher_ids.shape[:-1] != lead:
        raise ValueError(
            f"teacher_ids {tuple(teacher_ids.shape)} and teacher_logprobs {tuple(teacher_logprobs.shape)} "
            f"must both be {tuple(lead)} + (K,)"
        )
    ids = check_tokens(teacher_ids, teacher_ids.shape, student_logits)
    ids = ids.masked_fill(ids >= student_logits.shape[-1], -1)  # of a padded teacher: left over, not infinitely far
    valid = None if weights is None else check_weights(weights, lead, student_logits).detach() != 0
    logq, rest = token_logprobs(
        student_logits,
        ids,
        temperature,
        path,
        valid=valid,
        tail=tail == "bucket",
        student_scale=student_scale,
        student_softcap=student_softcap,
    )
    logp = teacher_logprobs.to(logq).masked_fill(ids < 0, -torch.inf)
    logq = logq.masked_fill(ids < 0, -torch.inf)
    if rest is not None:
        logp = torch.cat((logp, _remainder(logp, rest.detach()).unsqueeze(-1)), -1)
        logq = torch.cat((logq, rest.unsqueeze(-1)), -1)
    out = divergence(logq, logp, kind, 1.0, weights, "torch", stats, beta=beta, alpha=alpha, top_k=0)
    return DivergenceOutput(out.loss, out.stats, choose_path(path, student_logits))


def sampled_reverse_kl(
    student_logits: Tensor | LinearLogits,
    token_ids: Tensor,
    teacher_logprobs: Tensor,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    path: str = "auto",
    *,
    behaviour_logprobs: Tensor | None = None,
    max_ratio: float | None = None,
    student_scale: float = 1.0,
    student_softcap: float | None = None,
) -> DivergenceOutput:
    """Policy-gradient form of KL(q‖p) at sampled tokens: value w·(log q − log p), gradient w·(log q − log p)·∇log q.

    With y ~ q this is an unbiased estimate of the token's reverse KL and of its gradient. For tokens sampled by another
    policy b the importance ratio w = q(y)/b(y), held constant and cut off at `max_ratio`, corrects both.

    Args:
        student_logits: `[..., V]`, as in `divergence`, or `LinearLogits`.
        token_ids: leading shape; the sampled ids; negative ids are skipped.
        teacher_logprobs: leading shape; log p of the sampled ids, at the same temperature.
        behaviour_logprobs: leading shape; log b of the sampled ids; None for on-policy samples (w = 1).
        max_ratio: upper bound of w; None for none.
        weights: leading shape; multiplies the loss; a weight of 0 skips the token.

    Returns:
        `DivergenceOutput`; `stats` holds `student_logprob`, `teacher_logprob` and `importance_ratio`.
    """
    lead = student_logits.shape[:-1]
    ids = check_tokens(token_ids, lead, student_logits)
    scaled = None if weights is None else check_weights(weights, lead, student_logits)
    valid = ids >= 0 if scaled is None else (ids >= 0) & (scaled.detach() != 0)
    logq, _ = token_logprobs(
        student_logits,
        ids.unsqueeze(-1),
        temperature,
        path,
        valid=valid,
        student_scale=student_scale,
        student_softcap=student_softcap,
    )
    logq = logq.squeeze(-1)
    logp = torch.where(valid, teacher_logprobs.detach().to(logq), 0.0)
    now = logq.detach()
    ratio = torch.ones_like(now)
    if behaviour_logprobs is not None:
        ratio = torch.where(valid, (now - behaviour_logprobs.detach().to(now)).exp(), 1.0)
        ratio = ratio if max_ratio is None else ratio.clamp_max(max_ratio)
    loss = ratio * (now - logp) * (1.0 + logq - now)
    if scaled is not None:
        loss = loss * scaled
    stats = {"student_logprob": now, "teacher_logprob": logp, "importance_ratio": ratio}
    return DivergenceOutput(loss, stats, choose_path(path, student_logits))


def _remainder(logp: Tensor, rest: Tensor) -> Tensor:
    """log(1 − Σ p) `[...]`; −inf where rounding leaves nothing, or where the student has no other id (`rest` = −inf)."""
    kept = logp.logsumexp(-1)
    some = (kept < -8 * torch.finfo(kept.dtype).eps) & (rest > -torch.inf)
    return torch.where(some, torch.log(-torch.expm1(kept.clamp_max(-1e-30))), -torch.inf)
