"""Inputs that break naive divergences, and the comparison with the fp64 oracle: shared by the tests of all paths."""

import torch
from distill.kernels import divergence_oracle
from torch import Tensor

KINDS = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"beta": 0.5}),
    ("jsd", {"beta": 0.1}),
    ("skew_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", {"alpha": 0.1}),
    ("alpha", {"alpha": 0.3}),
    ("tvd", {}),
]
IDS = [kind + "".join(f"-{v}" for v in kw.values()) for kind, kw in KINDS]
REGIMES = ("far", "close", "peaked", "flat", "ties", "huge", "masked")


def logits(regime: str, n: int, v: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(student, teacher) fp32 `[n, v]`."""
    g = torch.Generator().manual_seed(seed)
    s, t = torch.randn(n, v, generator=g), torch.randn(n, v, generator=g)
    if regime == "far":
        return 3 * s, 3 * t
    if regime == "close":  # KL = 1e-4: where log-softmax and kl_div in fp32 are wrong in the second digit
        return 3 * t + 0.0142 * s, 3 * t
    if regime == "peaked":
        return 30 * s, 30 * t
    if regime == "flat":
        return 0.01 * s, 0.01 * t
    if regime == "ties":
        return s.round(), t.round()
    if regime == "huge":
        return 1e4 * s.sign() + s, 1e4 * t.sign() + t
    excluded = torch.rand(n, v, generator=g) < 0.3
    return (3 * s).masked_fill(excluded, -torch.inf), (3 * t).masked_fill(excluded, -torch.inf)


def relative_error(x: Tensor, reference: Tensor) -> float:
    """‖x − reference‖ / ‖reference‖ in fp64."""
    return ((x.double() - reference).norm() / reference.norm().clamp_min(1e-300)).item()


def oracle(student: Tensor, teacher: Tensor, kind: str, upstream: Tensor, **kw) -> tuple[Tensor, dict, Tensor]:
    """Oracle loss, statistics and gradient of Σ upstream·loss, fp64."""
    leaf = student.detach().double().requires_grad_()
    loss, stats = divergence_oracle(leaf, teacher, kind, **kw)
    (loss * upstream.double()).sum().backward()
    return loss.detach(), stats, leaf.grad
