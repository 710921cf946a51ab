"""The divergences, their parameters and the names of their statistics: the words that every path shares.

Notation: s, t are the logits of student and teacher after scale, softcap and temperature; q = softmax(s),
p = softmax(t); N tokens, V vocabulary. All logarithms are natural.

| kind              | loss                                            | parameter                                   |
|-------------------|-------------------------------------------------|---------------------------------------------|
| `forward_kl`      | KL(p‖q)                                         | -                                           |
| `reverse_kl`      | KL(q‖p)                                         | -                                           |
| `jsd`             | β·KL(p‖M) + (1−β)·KL(q‖M), M = β·p + (1−β)·q    | `beta` in [0, 1], default 0.5 (TRL, GKD)    |
| `skew_kl`         | KL(p‖α·p + (1−α)·q)                             | `alpha` in [0, 1), default 0.1 (DistiLLM)   |
| `skew_reverse_kl` | KL(q‖α·q + (1−α)·p)                             | `alpha` in [0, 1), default 0.1 (DistiLLM)   |
| `alpha`           | (1 − Σ p^α q^(1−α)) / (α(1−α))                  | `alpha` in [0, 1], default 0.5              |
| `tvd`             | ½ Σ|p − q|                                      | -                                           |

End points. The generalised JSD tends to 0 for β → 0 and β → 1; as in TRL, `beta=0` *means* forward KL (the limit of
JSD/β) and `beta=1` reverse KL (the limit of JSD/(1−β)). `skew_*` with `alpha=0` are the plain KLs. The α-divergence is
continuous: `alpha=1` is forward KL, `alpha=0` reverse KL.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "alpha", "tvd")
PATHS = ("auto", "triton", "torch")

BASE_STATS = (
    "forward_kl",  # KL(p‖q)
    "reverse_kl",  # KL(q‖p)
    "student_entropy",  # H(q)
    "teacher_entropy",  # H(p)
    "cross_entropy",  # −Σ p log q = KL(p‖q) + H(p)
    "student_max_prob",
    "teacher_max_prob",
    "top1_agreement",  # 1 where some id is most probable on both sides
)
TOPK_STATS = (
    "topk_agreement",  # |top-k(q) ∩ top-k(p)| / k
    "student_topk_entropy",  # entropy of q restricted to its top-k and renormalised
    "teacher_topk_entropy",
)
TOKEN_STATS = ("student_logprob", "teacher_logprob")  # of the given token id; 0 where the id is negative


@dataclass(frozen=True, slots=True)
class DivergenceOutput:
    """What every divergence returns.

    Attributes:
        loss: fp32, leading shape of the inputs (`[N]` for `[N, V]`), one value per token, in nats, times its weight.
        stats: name → fp32 tensor shaped like `loss`, detached, unweighted; empty unless `stats=True`.
        path: the implementation that ran, "triton" or "torch".
    """

    loss: "torch.Tensor"
    stats: Mapping[str, "torch.Tensor"] = field(default_factory=dict)
    path: str = "torch"


@dataclass(frozen=True, slots=True)
class Spec:
    """One fully resolved divergence: end points replaced by the KLs they mean, every parameter checked.

    Attributes:
        kind: one of `KINDS`.
        mix: weight of p in the mixture M (jsd, skew_*), or α of the α-divergence; 0.0 where unused.
        temperature: T > 0 in nats; logits are divided by it.
        student_scale, teacher_scale: multiply the raw logits first (Cohere's `logit_scale`).
        student_softcap, teacher_softcap: c > 0 turns x into c·tanh(x/c) (Gemma 2); 0.0 is off.
    """

    kind: str
    mix: float = 0.0
    temperature: float = 1.0
    student_scale: float = 1.0
    student_softcap: float = 0.0
    teacher_scale: float = 1.0
    teacher_softcap: float = 0.0

    def numbers(self) -> list[float]:
        """The parameters as a flat list: what a torch operator can take (inverse of `from_numbers`)."""
        return [
            self.mix,
            self.temperature,
            self.student_scale,
            self.student_softcap,
            self.teacher_scale,
            self.teacher_softcap,
        ]

    @staticmethod
    def from_numbers(kind: str, numbers: list[float]) -> "Spec":
        return Spec(kind, *numbers)


def make_spec(
    kind: str,
    *,
    beta: float = 0.5,
    alpha: float | None = None,
    temperature: float = 1.0,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Spec:
    """Checks every parameter and resolves the end points (see the module's table).

    Raises:
        ValueError: for an unknown kind, or a parameter outside its range; the message names the choices.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown divergence kind {kind!r}; choose one of {', '.join(KINDS)}")
    kind, mix = _resolve_mix(kind, beta, alpha)
    _require(_positive(temperature), f"temperature must be a finite number above 0, got {temperature!r}")
    scales = {"student_scale": student_scale, "teacher_scale": teacher_scale}
    for name, scale in scales.items():
        _require(_positive(scale), f"{name} must be a finite number above 0, got {scale!r}")
    caps = {"student_softcap": student_softcap, "teacher_softcap": teacher_softcap}
    for name, cap in caps.items():
        _require(cap is None or _positive(cap), f"{name} must be None (off) or a finite number above 0, got {cap!r}")
    return Spec(
        kind,
        mix,
        float(temperature),
        float(student_scale),
        float(student_softcap or 0.0),
        float(teacher_scale),
        float(teacher_softcap or 0.0),
    )


def stat_names(top_k: int, with_tokens: bool) -> tuple[str, ...]:
    """The rows of a statistics tensor, in order."""
    return BASE_STATS + (TOPK_STATS if top_k > 0 else ()) + (TOKEN_STATS if with_tokens else ())


def _resolve_mix(kind: str, beta: float, alpha: float | None) -> tuple[str, float]:
    """(kind, mix) after the end points; parameters that `kind` does not use are not looked at."""
    if kind == "jsd":
        _require(0.0 <= beta <= 1.0, f"beta of jsd must lie in [0, 1], got {beta!r}")
        return {0.0: ("forward_kl", 0.0), 1.0: ("reverse_kl", 0.0)}.get(float(beta), ("jsd", float(beta)))
    if kind in ("skew_kl", "skew_reverse_kl"):
        skew = 0.1 if alpha is None else float(alpha)
        _require(0.0 <= skew < 1.0, f"alpha of {kind} must lie in [0, 1), got {alpha!r} (at 1 the loss is 0)")
        if skew == 0.0:
            return ("forward_kl" if kind == "skew_kl" else "reverse_kl"), 0.0
        return kind, skew if kind == "skew_kl" else 1.0 - skew
    if kind == "alpha":
        order = 0.5 if alpha is None else float(alpha)
        _require(0.0 <= order <= 1.0, f"alpha of the alpha-divergence must lie in [0, 1], got {alpha!r}")
        return {0.0: ("reverse_kl", 0.0), 1.0: ("forward_kl", 0.0)}.get(order, ("alpha", order))
    return kind, 0.0


def _positive(x: float) -> bool:
    return math.isfinite(x) and x > 0


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)
