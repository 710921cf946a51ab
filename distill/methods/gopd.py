"""Generalised on-policy distillation, G-OPD and ExOPD (arXiv 2602.12125): the teacher's gain over a reference, scaled by λ.

    max E_{y~q} [ λ·log(p(y)/r(y)) − KL(q ‖ r) ]      p teacher, r reference model, q student; optimum ∝ p^λ·r^(1−λ)

on the student's own rollouts. λ = 1 is plain on-policy distillation, λ < 1 stays nearer to the reference, λ > 1
extrapolates what the teacher learned beyond it (ExOPD, λ = 1.25).

    form=full      L = Σ_t KL(q_t ‖ softmax(λ·z_p + (1 − λ)·z_r))                full vocabulary, lower variance
    form=sampled   L = Σ_t sg(A_t)·log q(y_t),  A_t = log q − λ·log p − (1 − λ)·log r at the sampled token

Both have the same expected gradient: the target's missing normaliser in A_t is a constant, and a constant times ∇log q
has mean 0.

The reference is the student before training (``model.reference.path`` unset), or, from strong to weak, the model that the
teacher was trained from (paper: "reward correction"). Evidence: objective and sampled form exact, λ = 1.25 from the
paper's text by way of secondary sources; the full-vocabulary form is ours. Monitored divergences are those to the
extrapolated target in the full form. Options: ``conf/method/gopd.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distill.config import in_range, one_of
from distill.kernels import sampled_reverse_kl
from distill.methods.base import WHOLE, DivergenceSpec, Method, Source, Targets, TokenLosses
from distill.methods.parts import row_chunks, shared_vocabulary
from distill.teachers.signals import FullLogits, SampledToken, Signal


@dataclass(kw_only=True)
class GopdConfig:
    name: str = "gopd"
    lambda_: float = 1.25
    form: str = "full"
    max_ratio: float | None = None
    divergence: DivergenceSpec = field(default_factory=lambda: DivergenceSpec(kind="reverse_kl"))

    def __post_init__(self) -> None:
        in_range("method.lambda_", self.lambda_, low=0.0)
        one_of("method.form", self.form, ("full", "sampled"))
        if self.max_ratio is not None:
            in_range("method.max_ratio", self.max_ratio, low=1.0)


class Gopd(Method):
    Config = GopdConfig

    def __init__(self, config: GopdConfig) -> None:
        self.config = config
        self.needs = frozenset({"teacher"} if config.lambda_ == 1.0 else {"teacher", "reference"})
        whole = "divergence" if config.lambda_ == 1.0 else "logits"  # an extrapolated target has logits and no head
        self.reads = frozenset({"tokens" if config.form == "sampled" else whole})

    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        return Source.STUDENT

    @property
    def signals(self) -> frozenset[str]:
        if self.config.form == "sampled":
            return WHOLE | {"sampled"}
        return self.config.divergence.signals if self.config.lambda_ == 1.0 else WHOLE

    def token_losses(self, targets: Targets) -> TokenLosses:
        assert targets.teacher is not None
        if self.config.form == "full":
            return self.config.divergence(replace(targets, teacher=self._target(targets)))
        target = targets.teacher.logprobs_at(targets.token_ids)
        if self.config.lambda_ != 1.0:
            assert targets.reference is not None
            target = torch.lerp(targets.reference.logprobs_at(targets.token_ids), target, self.config.lambda_)
        logits, options = targets.student.operand()
        output = sampled_reverse_kl(
            logits,
            known_ids(targets),
            target,
            behaviour_logprobs=targets.behaviour_logprobs,
            max_ratio=self.config.max_ratio,
            **options,
        )
        return TokenLosses(output.loss, dict(output.stats))

    def _target(self, targets: Targets) -> Signal:
        assert targets.teacher is not None
        if self.config.lambda_ == 1.0:
            return targets.teacher
        assert targets.reference is not None
        return FullLogits(extrapolated(targets.teacher.logits(), targets.reference.logits(), self.config.lambda_))


def known_ids(targets: Targets) -> Tensor:
    """Token ids ``[T]``, −1 where teacher or reference say nothing about them."""
    ids = targets.token_ids
    for signal in (targets.teacher, targets.reference):
        ids = signal.known_ids(ids) if isinstance(signal, SampledToken) else ids
    return ids


def extrapolated(teacher: Tensor, reference: Tensor, lambda_: float) -> Tensor:
    """λ·z_p + (1 − λ)·z_r ``[T, V]`` over the shared vocabulary, in the teacher's dtype and computed in fp32.

    An id that either model excludes (−inf) stays excluded.
    """
    shared = shared_vocabulary(teacher, reference)
    target = teacher.new_empty(len(teacher), shared)
    for rows in row_chunks(len(teacher), shared):
        z_p, z_r = teacher[rows, :shared].float(), reference[rows, :shared].float()
        excluded = (z_p == -torch.inf) | (z_r == -torch.inf)
        target[rows] = torch.lerp(z_r, z_p, lambda_).masked_fill_(excluded, -torch.inf)
    return target
