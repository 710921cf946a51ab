"""ACE: asymmetric confidence-aware errors on top of GRPO (arXiv 2602.21420).

Wrong answers that the policy has grown sure of are pushed down harder:

    c_i = Σ_t log q(y_it) − log π_ref(y_it)                  how much likelier rollout i has become; no gradient
    Â_i ← Â_i·(1 + α·softplus(c_i))                          where Â_i < 0; other advantages stay

The gradient is that of a reverse-KL regulariser restricted to overconfident errors, plus a remainder (the paper's Theorem
1).

Evidence: idea, c_i and softplus from the abstract and secondary texts; α was not found (1 here; a third-party text uses
0.5 to 2). c_i grows with the length, so that one long answer can dwarf a batch: ``c_clip`` bounds it on both sides and
``per_length`` divides it by the number of tokens (both off, as in the formula). ACE needs a sensible reference; it is the
student before training unless ``model.reference.path`` names another. Options: ``conf/method/ace.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import in_range
from distill.methods.base import Targets
from distill.methods.grpo import Grpo, GrpoConfig
from distill.methods.parts import sums_per_sequence


@dataclass(kw_only=True)
class AceConfig(GrpoConfig):
    name: str = "ace"
    alpha: float = 1.0
    c_clip: float | None = None
    per_length: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("method.alpha", self.alpha, low=0.0)
        if self.c_clip is not None:
            in_range("method.c_clip", self.c_clip, low=0.0)


class Ace(Grpo):
    Config = AceConfig
    config: AceConfig

    def __init__(self, config: AceConfig) -> None:
        super().__init__(config)
        self.needs = frozenset({"reference"})

    def _advantages(self, targets: Targets, logprob: Tensor, reference: Tensor | None) -> Tensor:
        assert targets.advantages is not None
        assert targets.sequence_index is not None
        assert reference is not None
        change = logprob - reference
        confidence = sums_per_sequence(change, targets.sequence_index)
        if self.config.per_length:
            confidence = confidence / sums_per_sequence(torch.ones_like(change), targets.sequence_index)
        if self.config.c_clip is not None:
            confidence = confidence.clamp(-self.config.c_clip, self.config.c_clip)
        factor = 1.0 + self.config.alpha * torch.nn.functional.softplus(confidence)
        return torch.where(targets.advantages < 0, targets.advantages * factor, targets.advantages)
