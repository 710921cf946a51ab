"""Generalised knowledge distillation (Agarwal et al. 2024, arXiv 2306.13649).

``L = Σ_t JSD_β(p_t ‖ q_t)`` with ``JSD_β = β·KL(p ‖ m) + (1−β)·KL(q ‖ m)``, ``m = β·p + (1−β)·q``; β → 0 is forward KL and
β → 1 reverse KL (both taken as exact limits). A share λ of the samples is the student's own rollouts, the rest
fixed or teacher text. Which sample is which depends on its number and the seed alone, so that any world size and a
resumed run draw the same mix. Options: ``conf/method/gkd.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from distill.config import in_range
from distill.methods.base import DivergenceSpec, Method, Source, Targets, TextSpec, TokenLosses
from distill.seeds import mix


@dataclass(kw_only=True)
class GkdConfig(TextSpec):
    name: str = "gkd"
    lambda_: float = 0.5
    divergence: DivergenceSpec = field(default_factory=lambda: DivergenceSpec(kind="jsd"))

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("method.lambda_", self.lambda_, low=0.0, high=1.0)


class Gkd(Method):
    Config = GkdConfig
    reads = frozenset({"divergence"})

    def __init__(self, config: GkdConfig) -> None:
        self.config = config

    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        share = mix(seed, sample) / 2**64
        return Source.STUDENT if share < self.config.lambda_ else Source(self.config.text)

    def uses(self) -> set[Source]:
        wanted = {Source.STUDENT} if self.config.lambda_ > 0 else set()
        return wanted | ({Source(self.config.text)} if self.config.lambda_ < 1 else set())

    @property
    def signals(self) -> frozenset[str]:
        return self.config.divergence.signals

    def token_losses(self, targets: Targets) -> TokenLosses:
        return self.config.divergence(targets)
