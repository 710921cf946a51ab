"""GRPO: group-relative policy optimisation on verifier rewards (Shao et al. 2024, arXiv 2402.03300).

G rollouts of each prompt, reward R_i = 1 where the verifier accepts rollout i, else 0:

    Â_i = (R_i − mean_G R) / (std_G R + 1e-6)          scale=none leaves out the division (Dr.GRPO, arXiv 2503.20783)
    r_t = q(y_t) / b(y_t)                              b: the policy that wrote y (its log-probabilities are kept)
    L   = Σ_t −min(r_t·Â, clip(r_t, 1 − ε_low, 1 + ε_high)·Â) + β·k3_t
    k3  = e^u − u − 1,  u = log π_ref(y_t) − log q(y_t)

With ``dual_clip`` c > 1 the loss of a negative advantage is at most −c·Â (Ye et al. 2020). A group whose rewards are all
equal has advantage 0 and no gradient but k3's. One update is made per rollout, so r_t = 1 up to rounding and clipping acts
on stale rollouts only.

Evidence: exact, as in the paper and in verl and TRL; std is the sample standard deviation (n − 1), as in both. Defaults:
G = 8, ε = 0.2 (DAPO: ε_high = 0.28), β = 0 (DAPO and later work drop the term; the paper has 0.04). The sum over tokens
is ``train.aggregation``: token_mean is DAPO, sequence_mean GRPO, constant Dr.GRPO. Options: ``conf/method/grpo.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from distill.config import in_range, one_of
from distill.methods.base import WHOLE, BatchFacts, Method, Source, Targets, TokenLosses, Weight
from distill.methods.parts import no_verdict


@dataclass(kw_only=True)
class GrpoConfig:
    name: str = "grpo"
    group: int = 8
    scale: str = "std"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl: float = 0.0

    def __post_init__(self) -> None:
        in_range("method.group", self.group, low=2)
        one_of("method.scale", self.scale, ("std", "none"))
        in_range("method.clip_low", self.clip_low, low=0.0, high=1.0)
        in_range("method.clip_high", self.clip_high, low=0.0)
        in_range("method.kl", self.kl, low=0.0)
        if self.dual_clip is not None:
            in_range("method.dual_clip", self.dual_clip, low=1.0)


class Grpo(Method):
    Config = GrpoConfig
    reads = frozenset({"tokens"})

    def __init__(self, config: GrpoConfig) -> None:
        self.config = config
        self.samples_per_prompt = config.group
        self.needs = frozenset({"reference"} if config.kl > 0 else ())

    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        return Source.STUDENT

    def weigh(self, facts: BatchFacts) -> Sequence[Weight]:
        weights = [Weight()] * len(facts.sequences)
        for members in facts.groups().values():
            rewards = [self._reward(facts, i) for i in members]
            for i, advantage in zip(members, advantages(rewards, self.config.scale), strict=True):
                weights[i] = Weight(advantage=advantage)
        return weights

    def _reward(self, facts: BatchFacts, position: int) -> float:
        sequence = facts.sequences[position]
        if sequence.correct is None:
            raise no_verdict(sequence.sample, self.config.name)
        return sequence.correct

    @property
    def signals(self) -> frozenset[str]:
        return WHOLE | {"sampled"}

    def token_losses(self, targets: Targets) -> TokenLosses:
        nll = targets.nll()
        logprob = -nll.loss
        reference = None
        if targets.reference is not None:
            reference = targets.reference.logprobs_at(targets.token_ids)
        advantage = self._advantages(targets, logprob.detach(), reference)
        loss, stats = clipped_losses(logprob, targets.behaviour_logprobs, advantage, self.config)
        if reference is not None:
            k3 = k3_estimate(logprob, reference)
            loss = loss + self.config.kl * k3
            stats["reference_kl"] = k3.detach()
        return TokenLosses(loss, {**nll.stats, **stats})

    def _advantages(self, targets: Targets, logprob: Tensor, reference: Tensor | None) -> Tensor:
        """The advantage of every token; methods built on this one may reshape it."""
        assert targets.advantages is not None
        return targets.advantages


def advantages(rewards: Sequence[float], scale: str) -> list[float]:
    """Group-normalised rewards; exactly 0 where all are equal."""
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean, unit = fmean(rewards), stdev(rewards) + 1e-6 if scale == "std" else 1.0
    return [(reward - mean) / unit for reward in rewards]


def clipped_losses(
    logprob: Tensor, behaviour: Tensor | None, advantage: Tensor, config: GrpoConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of every token ``[T]`` and its figures; without behaviour log-probabilities the ratio is 1."""
    now = logprob.detach()
    old = now if behaviour is None else torch.where(behaviour.isnan(), now, behaviour)
    ratio = (logprob - old).exp()
    free, bounded = ratio * advantage, ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high) * advantage
    loss = -torch.minimum(free, bounded)
    clipped = bounded < free
    if config.dual_clip is not None:
        ceiling = -config.dual_clip * advantage
        over = (advantage < 0) & (loss > ceiling)
        loss, clipped = torch.where(over, ceiling, loss), clipped | over
    return loss, {"ratio": ratio.detach(), "clipped": clipped.float()}


def k3_estimate(logprob: Tensor, reference: Tensor) -> Tensor:
    """e^u − u − 1 ≥ 0 with u = log π_ref − log q: unbiased for KL(q ‖ π_ref) at tokens drawn from q."""
    difference = reference.detach() - logprob
    return torch.expm1(difference) - difference
