"""Off-policy word-level distillation: ``L = Σ_t KL(p_t ‖ q_t)`` on reference or teacher text.

p is the teacher, q the student (Hinton et al. 2015, arXiv 1503.02531; Kim & Rush 2016, arXiv 1606.07947).
Options: ``conf/method/off_policy.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from distill.methods.base import DivergenceSpec, Method, Source, Targets, TextSpec, TokenLosses


@dataclass(kw_only=True)
class OffPolicyConfig(TextSpec):
    name: str = "off_policy"
    divergence: DivergenceSpec = field(default_factory=DivergenceSpec)


class OffPolicy(Method):
    Config = OffPolicyConfig
    reads = frozenset({"divergence"})

    def __init__(self, config: OffPolicyConfig) -> None:
        self.config = config

    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        return Source(self.config.text)

    @property
    def signals(self) -> frozenset[str]:
        return self.config.divergence.signals

    def token_losses(self, targets: Targets) -> TokenLosses:
        return self.config.divergence(targets)
