"""On-policy distillation: ``L = Σ_t KL(q_t ‖ p_t)`` over full vocabularies, on rollouts of the current student.

Gradients flow through q_t at each position, not through the sampling (as in MiniLLM's single-step term and GKD).
Options: ``conf/method/on_policy.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from distill.methods.base import DivergenceSpec, Method, Source, Targets, TokenLosses


@dataclass(kw_only=True)
class OnPolicyConfig:
    name: str = "on_policy"
    divergence: DivergenceSpec = field(default_factory=lambda: DivergenceSpec(kind="reverse_kl"))


class OnPolicy(Method):
    Config = OnPolicyConfig
    reads = frozenset({"divergence"})

    def __init__(self, config: OnPolicyConfig) -> None:
        self.config = config

    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        return Source.STUDENT

    @property
    def signals(self) -> frozenset[str]:
        return self.config.divergence.signals

    def token_losses(self, targets: Targets) -> TokenLosses:
        return self.config.divergence(targets)
