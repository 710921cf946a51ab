"""`linear_divergence`: the divergence from hidden states and LM heads, without the logits of more than a few tokens.

Tokens of weight 0 are dropped first; the rest go through in chunks whose fp32 logits, student's and teacher's together,
stay under a byte budget. Two ways to the gradient (FLOPs for equal hidden sizes):

    "recompute"  12·N·H·V  keeps five numbers per token and forms each chunk's logits again in the backward pass; any
                           upstream gradient; the least memory.
    "forward"     8·N·H·V  forms the gradient of the weighted loss during the forward pass, while the logits exist, and
                           only scales it later: the upstream gradient must be one number for all tokens (a sum or a
                           mean of the losses: put per-token factors into `weights`), or a multiple of `upstream`, the
                           factors by which the caller will multiply the losses. Checked, not assumed.

Heads of ZeRO-3 or FSDP must be gathered where this is called, in the backward pass too for "recompute": call it inside
the forward of a module that owns the head, as the trainer does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .dense import check_tokens, check_weights, choose_path
from .kinds import DivergenceOutput, make_spec, stat_names
from .linear_ops import linear_divergence_op

GRADIENTS = ("recompute", "forward")


@dataclass(frozen=True, slots=True)
class _Heads:
    """Checked operands: hidden states `[N, H]`, heads `[V, H]` with the shared vocabulary, biases `[V]`."""

    student_hidden: Tensor
    student_head: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor
    teacher_head: Tensor
    teacher_bias: Tensor | None


def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    weights: Tensor | None = None,
    path: str = "auto",
    stats: bool = False,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    gradient: str = "recompute",
    upstream: Tensor | None = None,
    budget_bytes: int | None = None,
    beta: float = 0.5,
    alpha: float | None = None,
    token_ids: Tensor | None = None,
    top_k: int = 20,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    temperature_squared: bool = False,
) -> DivergenceOutput:
    """As `divergence` with logits = hidden · headᵀ + bias; differentiable in the student's hidden states, head, bias.

    Args:
        student_hidden: `[..., H_s]`; teacher_hidden: `[..., H_t]`, same leading shape.
        student_head: `[V_s, H_s]`; teacher_head: `[V_t, H_t]`; each in the dtype of its hidden states (under autocast
            both are cast to the autocast dtype). They may be the same tensor; a head that needs no gradient costs none.
        student_bias, teacher_bias: `[V_s]`, `[V_t]` or None.
        gradient: "recompute" or "forward" (see the module).
        upstream: leading shape, for gradient="forward" without `weights`: the gradient that the losses will receive, up to
            one factor. It changes no loss and skips no token.
        budget_bytes: bytes of fp32 logits alive at a time, both models together; default 2 GiB on CUDA, 256 MiB on CPU.
        others: as in `divergence`.

    Returns:
        `DivergenceOutput`; logits, losses and sums over tokens are fp32 (fp64 for fp64 inputs) whatever the inputs are.

    Raises:
        ValueError, TypeError: as `divergence`; and in the backward pass of gradient="forward" for an upstream gradient
            that is not the same for all tokens, nor a multiple of `upstream`.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"unknown gradient mode {gradient!r}; choose one of {', '.join(GRADIENTS)}")
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
    lead = student_hidden.shape[:-1]
    heads = _prepare(student_hidden, student_head, student_bias, teacher_hidden, teacher_head, teacher_bias, vocab_size)
    chosen = choose_path(path, heads.student_hidden, heads.teacher_hidden)
    tokens = None if token_ids is None or not stats else check_tokens(token_ids, lead, student_hidden).reshape(-1)
    scaled = None if weights is None else check_weights(weights, lead, student_hidden)
    if gradient == "forward" and scaled is not None and scaled.requires_grad:
        raise ValueError("gradient='forward' cannot differentiate in the weights; use gradient='recompute'")
    if upstream is not None and (gradient != "forward" or scaled is not None):
        raise ValueError("upstream= is for gradient='forward' without weights=")
    factors = None if upstream is None else check_weights(upstream, lead, student_hidden).detach().reshape(-1)
    names = stat_names(top_k, tokens is not None) if stats else ()
    budget = default_budget(student_hidden.device) if budget_bytes is None else budget_bytes
    loss, rows, *_ = linear_divergence_op(
        heads.student_hidden,
        heads.student_head,
        heads.student_bias,
        heads.teacher_hidden.detach(),
        heads.teacher_head.detach(),
        None if heads.teacher_bias is None else heads.teacher_bias.detach(),
        None if scaled is None else scaled.detach().reshape(-1),
        factors,
        tokens,
        spec.kind,
        spec.numbers(),
        top_k,
        len(names),
        chosen,
        budget,
        _wanted(heads, gradient),
    )
    loss = loss.reshape(lead)
    if temperature_squared:
        loss = loss * temperature**2
    if scaled is not None and gradient == "recompute":
        loss = loss * scaled
    rows = rows.detach()
    return DivergenceOutput(loss, {name: rows[i].reshape(lead) for i, name in enumerate(names)}, chosen)


def default_budget(device: torch.device) -> int:
    """Enough rows for a GPU's products to be bound by arithmetic; on CPU little more than the head itself."""
    return 2 * 2**30 if device.type == "cuda" else 256 * 2**20


def _wanted(heads: _Heads, gradient: str) -> list[bool]:
    """Which of (hidden, head, bias) gradients the forward pass must form: none for "recompute"."""
    operands = (heads.student_hidden, heads.student_head, heads.student_bias)
    active = gradient == "forward" and torch.is_grad_enabled()
    return [active and x is not None and x.requires_grad for x in operands]


def _prepare(
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    vocab_size: int | None,
) -> _Heads:
    """Checks shapes and devices, cuts both heads to the shared vocabulary, follows autocast."""
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            "student and teacher hidden states must agree in all but the last dimension: "
            f"got {tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}"
        )
    sides = (
        ("student", student_hidden, student_head, student_bias),
        ("teacher", teacher_hidden, teacher_head, teacher_bias),
    )
    for side, hidden, head, bias in sides:
        _check_side(side, hidden, head, bias, student_hidden.device)
    shared = min(student_head.shape[0], teacher_head.shape[0])
    shared = shared if vocab_size is None else min(shared, vocab_size)
    if shared < 1:
        raise ValueError("the shared vocabulary is empty")
    cut = [x if x is None or x.shape[0] == shared else x[:shared] for _, _, *pair in sides for x in pair]
    dtype = _autocast_dtype(student_hidden.device)
    student_rows, teacher_rows = (x.reshape(-1, x.shape[-1]) for x in (student_hidden, teacher_hidden))
    operands = [
        x if x is None or dtype is None else x.to(dtype) for x in (student_rows, *cut[:2], teacher_rows, *cut[2:])
    ]
    heads = _Heads(*operands)  # type: ignore[arg-type]
    _check_dtypes("student", heads.student_hidden, heads.student_head)
    _check_dtypes("teacher", heads.teacher_hidden, heads.teacher_head)
    return heads


def checked_head(side: str, hidden: Tensor, head: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """One model's operands `[N, H]`, `[V, H]`, `[V]`, in the autocast dtype where that is on. Raises as `linear_divergence`."""
    _check_side(side, hidden, head, bias, hidden.device)
    rows, dtype = hidden.reshape(-1, hidden.shape[-1]), _autocast_dtype(hidden.device)
    if dtype is not None:
        rows, head, bias = rows.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype)
    _check_dtypes(side, rows, head)
    return rows, head, bias


def _check_side(side: str, hidden: Tensor, head: Tensor, bias: Tensor | None, device: torch.device) -> None:
    if head.dim() != 2 or head.shape[1] != hidden.shape[-1]:
        hint = " (a ZeRO-3 or FSDP shard? gather it first)" if head.numel() == 0 or head.dim() != 2 else ""
        raise ValueError(f"{side}_head must be [V, {hidden.shape[-1]}], got {tuple(head.shape)}{hint}")
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(f"{side}_bias must be [{head.shape[0]}], got {tuple(bias.shape)}")
    for name, x in (("hidden", hidden), ("head", head)):
        if x.device != device:
            raise ValueError(f"{side}_{name} is on {x.device}, but student_hidden is on {device}")


def _check_dtypes(side: str, hidden: Tensor, head: Tensor) -> None:
    if hidden.dtype != head.dtype:
        raise TypeError(
            f"the {side}'s hidden states are {hidden.dtype} but its head is {head.dtype}: cast one, or use autocast"
        )


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
