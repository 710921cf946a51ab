"""Log-probabilities of given token ids without a log-softmax of the vocabulary: `token_logprobs` and `token_nll`.

The one primitive under supervised fine-tuning, sparse teachers and policy gradients. For ids J of a token,
    log q_j = s_j − log Σ_k e^{s_k},      tail = log Σ_{k∉J} q_k,
    ∂/∂s_k = q_k·A + Σ_j [k = j]·B_j,     A = g_tail/q_tail − g_tail − Σ_j g_j,   B_j = g_j − q_j·g_tail/q_tail
so that the backward pass is one sweep `q·A` and K corrections per token. Saved per token: m and log z.
"""

from torch import Tensor

from .dense import as_rows, check_tokens, check_weights, choose_path
from .kinds import DivergenceOutput, Spec, make_spec
from .linear import checked_head, default_budget
from .linear_tokens import LinearLogits, linear_token_logprobs_op
from .token_ops import N_STATS, token_logprobs_op

NLL_STATS = ("student_entropy", "student_max_prob", "top1_agreement", "student_logprob")


def token_nll(
    student_logits: Tensor | LinearLogits,
    token_ids: Tensor,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    path: str = "auto",
    stats: bool = False,
    *,
    student_scale: float = 1.0,
    student_softcap: float | None = None,
) -> DivergenceOutput:
    """−log q[id] for every token (cross-entropy with hard targets), unreduced; differentiable in the logits.

    Args:
        student_logits: `[..., V]`, or `LinearLogits`; dtypes, scale, softcap, temperature as in `divergence`.
        token_ids: leading shape, integers; tokens with a negative id (−100) are skipped like those of weight 0.
        weights: leading shape; multiplies the loss; tokens of weight 0 are skipped.
        stats: adds `NLL_STATS`: `top1_agreement` is 1 where no id is more probable than the given one.

    Returns:
        `DivergenceOutput`: `loss` fp32 (fp64 for fp64 logits) of the leading shape.
    """
    lead = student_logits.shape[:-1]
    ids = check_tokens(token_ids, lead, student_logits)
    scaled = None if weights is None else check_weights(weights, lead, student_logits)
    valid = ids >= 0 if scaled is None else (ids >= 0) & (scaled.detach() != 0)
    spec = make_spec(
        "forward_kl", temperature=temperature, student_scale=student_scale, student_softcap=student_softcap
    )
    logq, _, rows, chosen = _call(student_logits, ids.unsqueeze(-1), valid, spec, path, N_STATS if stats else 0, False)
    loss = -logq.squeeze(-1)
    if scaled is not None:
        loss = loss * scaled
    if not stats:
        return DivergenceOutput(loss, {}, chosen)
    values = (*(row.reshape(lead) for row in rows), logq.detach().squeeze(-1).to(rows.dtype))
    return DivergenceOutput(loss, dict(zip(NLL_STATS, values, strict=True)), chosen)


def token_logprobs(
    student_logits: Tensor | LinearLogits,
    token_ids: Tensor,
    temperature: float = 1.0,
    path: str = "auto",
    *,
    valid: Tensor | None = None,
    tail: bool = False,
    student_scale: float = 1.0,
    student_softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log q at K distinct ids per token, and the log of the probability left over; differentiable in the logits.

    Args:
        student_logits: `[..., V]`, or `LinearLogits`; dtypes, scale, softcap, temperature as in `divergence`.
        token_ids: `[..., K]` integers, distinct within a token; negative ids are padding: value 0, gradient 0.
        valid: bool, leading shape; False skips the token (values and gradient 0).
        tail: also return log Σ q over all other ids (−inf where there is none).

    Returns:
        `[..., K]` and `[...]` (or None), fp32 (fp64 for fp64 logits).
    """
    lead = student_logits.shape[:-1]
    if token_ids.shape[:-1] != lead:
        raise ValueError(f"token_ids must be {tuple(lead)} + (K,), got {tuple(token_ids.shape)}")
    ids = check_tokens(token_ids, token_ids.shape, student_logits)
    spec = make_spec(
        "forward_kl", temperature=temperature, student_scale=student_scale, student_softcap=student_softcap
    )
    logq, rest, _, _ = _call(student_logits, ids, valid, spec, path, 0, tail)
    return logq, rest


def _call(
    logits: Tensor | LinearLogits,
    ids: Tensor,
    valid: Tensor | None,
    spec: Spec,
    path: str,
    n_stats: int,
    tail: bool,
) -> tuple[Tensor, Tensor | None, Tensor, str]:
    """(log q `[..., K]`, tail `[...]` or None, statistics, path)."""
    chosen = choose_path(path, logits)
    lead, k = logits.shape[:-1], ids.shape[-1]
    mask = None if valid is None else valid.reshape(-1)
    common = (ids.reshape(-1, k), mask, spec.numbers(), tail, n_stats, chosen)
    if isinstance(logits, LinearLogits):
        budget = default_budget(logits.device) if logits.budget_bytes is None else logits.budget_bytes
        operands = checked_head("student", logits.hidden, logits.head, logits.bias)
        values, _, rows = linear_token_logprobs_op(*operands, *common, budget)
    else:
        values, _, rows = token_logprobs_op(as_rows(logits), *common)
    rest = values[:, k].reshape(lead) if tail else None
    return values[:, :k].reshape(*lead, k), rest, rows.detach(), chosen
