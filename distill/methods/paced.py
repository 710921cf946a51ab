"""PACED (arXiv 2603.11178): distillation weighted by what the student is ready to learn.

    p(x) = share of K student rollouts of prompt x that are correct
    w(p) = p^α·(1 − p)^β,      L = Σ_x w(p(x))·L_KD(x)

The ratio of gradient signal to noise vanishes at p → 0 (out of reach) and at p → 1 (mastered); the paper shows the Beta
kernel to be the leading-order optimal family and recommends α = β = 1. Two stages: forward KL on reference or teacher
text, then reverse KL on the student's own ("mode coverage, then consolidation"); each stage takes any divergence.

p is measured when it is used, with the weights of that step: by K probes (rollouts that are not trained on), or, where
the K sequences of a prompt are all the student's own (``stages=reverse pass_rate=group``), by that group at no extra
cost. Nothing is remembered between steps, so nothing can be stale and a resumed run measures the same.

Evidence: p, w, α = β = 1 and the two stages from the paper's abstract and its authors' notes. Not found and therefore
options: K (8), the point of the switch (half of the run), normalisation (weights of a step scaled to mean 1, which keeps
the meaning of the learning rate: w ≤ ¼ otherwise), the floor (0: prompts with p = 0 or 1 are dropped). Where all weights
of a step are 0 it has no gradient. Options: ``conf/method/paced.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from distill.config import in_range, one_of
from distill.errors import ConfigError
from distill.methods.base import BatchFacts, DivergenceSpec, Method, Source, Targets, TextSpec, TokenLosses, Weight
from distill.methods.parts import no_verdict

STAGES = ("forward_reverse", "forward", "reverse")


@dataclass(kw_only=True)
class PacedConfig(TextSpec):
    name: str = "paced"
    stages: str = "forward_reverse"
    switch: float = 0.5
    rollouts: int = 8
    pass_rate: str = "probes"
    alpha: float = 1.0
    beta: float = 1.0
    normalise: bool = True
    floor: float = 0.0
    forward: DivergenceSpec = field(default_factory=lambda: DivergenceSpec(kind="forward_kl"))
    reverse: DivergenceSpec = field(default_factory=lambda: DivergenceSpec(kind="reverse_kl"))

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("method.stages", self.stages, STAGES)
        one_of("method.pass_rate", self.pass_rate, ("probes", "group"))
        in_range("method.switch", self.switch, low=0.0, high=1.0)
        in_range("method.rollouts", self.rollouts, low=2)
        in_range("method.alpha", self.alpha, low=0.0)
        in_range("method.beta", self.beta, low=0.0)
        in_range("method.floor", self.floor, low=0.0)
        if self.pass_rate == "group" and self.stages != "reverse":
            raise ConfigError(
                f"method.pass_rate=group reads pass rates off the rollouts that are trained on, and method.stages={self.stages} "
                "trains on other text too; set method.pass_rate=probes, or method.stages=reverse"
            )


class Paced(Method):
    Config = PacedConfig
    reads = frozenset({"divergence"})

    def __init__(self, config: PacedConfig) -> None:
        self.config = config
        if config.pass_rate == "group":
            self.samples_per_prompt = config.rollouts
        else:
            self.probe_rollouts = config.rollouts

    def consolidates(self, progress: float) -> bool:
        """Whether a step at this share of the run belongs to the second stage: reverse KL on the student's text."""
        if self.config.stages == "forward_reverse":
            return progress >= self.config.switch
        return self.config.stages == "reverse"

    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        return Source.STUDENT if self.consolidates(progress) else Source(self.config.text)

    def uses(self) -> set[Source]:
        return {self.source(0, 0, 0.0), self.source(0, 0, 1.0)}

    def weigh(self, facts: BatchFacts) -> Sequence[Weight]:
        rates = []
        for sequence, rate in zip(facts.sequences, facts.pass_rates(), strict=True):
            if rate is None:
                raise no_verdict(sequence.sample, self.config.name)
            rates.append(rate)
        return [Weight(weight=weight) for weight in competence_weights(rates, self.config)]

    @property
    def signals(self) -> frozenset[str]:
        return self.config.forward.signals & self.config.reverse.signals

    def token_losses(self, targets: Targets) -> TokenLosses:
        stage = self.config.reverse if self.consolidates(targets.progress) else self.config.forward
        return stage(targets)


def competence_weights(rates: Sequence[float], config: PacedConfig) -> list[float]:
    """w(p) of each pass rate, with the floor, scaled to mean 1 where wanted (all zero stays all zero)."""
    weights = [max(p**config.alpha * (1.0 - p) ** config.beta, config.floor) for p in rates]
    mean = sum(weights) / max(len(weights), 1)
    return [weight / mean for weight in weights] if config.normalise and mean > 0 else weights
