"""MOTAB: monitored trajectories with adaptive backtracking (arXiv 2605.19433).

Off-policy text has exposure bias; on-policy scores have its reverse, as the teacher judges states that it would never reach. So
the student explores, and the teacher takes over where a step breaches its boundary, from the step t* at which things went wrong:

    V_t = (Π_i p_T(y_i))^(1/L),   accept iff V_t ≥ ε0·exp(−θ·H_T(s_{t−1})),   t* = argmin_k V_k − V_{k−1}
    text = student steps 1..t ⊕ "However," ⊕ the teacher's steps from t* on
    L = −Σ log q(text)                       loss=sft, the paper's
      = Σ D(p ‖ q) at the text's tokens      loss=divergence

Formulas: `distill.rollouts.boundary`; engine: `distill.rollouts.monitored`. The paper makes the text once and then trains
(``distill rollout method=motab``, then ``method=sft data=jsonl``); here ``distill train method=motab`` also writes it anew in every
step with the student as it then is. Options, each default and where it is from: ``conf/method/motab.yaml``. The paper samples
both models at ``rollout.temperature=0.6``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import RunConfig, one_of
from distill.methods.base import DivergenceSpec, Method, Source, Targets, TokenLosses, Writer
from distill.rollouts.monitored_options import MonitorOptions


@dataclass(kw_only=True)
class MonitoredLoss:
    """Common options of methods on monitored text."""

    loss: str = "sft"
    divergence: DivergenceSpec = field(default_factory=DivergenceSpec)

    def __post_init__(self) -> None:
        one_of("method.loss", self.loss, ("sft", "divergence"))


@dataclass(kw_only=True)
class MotabConfig(MonitorOptions, MonitoredLoss):
    name: str = "motab"

    def __post_init__(self) -> None:
        MonitorOptions.__post_init__(self)
        MonitoredLoss.__post_init__(self)


class MonitoredMethod(Method):
    """A method whose text is made by `distill.rollouts.monitored.Monitored` under the options ``monitor``."""

    def __init__(self, config: MonitoredLoss, monitor: MonitorOptions) -> None:
        self.config, self.monitor = config, monitor
        self.needs = frozenset({"teacher"} if config.loss == "divergence" else ())
        self.reads = frozenset({"divergence" if config.loss == "divergence" else "tokens"})

    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        return Source.MONITORED

    def writer(
        self, student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig
    ) -> Writer:
        # Here, not above: distill.samples imports the methods.
        from distill.rollouts.monitored import Monitored
        from distill.samples import sampling_params

        return Monitored(
            student,
            teacher,
            tokenizer,
            self.monitor,
            sampling_params(config.rollout),
            slots=config.rollout.slots,
            context_length=config.train.max_length,
        )

    @property
    def signals(self) -> frozenset[str]:
        return self.config.divergence.signals

    def token_losses(self, targets: Targets) -> TokenLosses:
        if self.config.loss == "divergence":
            return self.config.divergence(targets)
        output = targets.nll()
        return TokenLosses(output.loss, dict(output.stats or {}))


class Motab(MonitoredMethod):
    Config = MotabConfig

    def __init__(self, config: MotabConfig) -> None:
        super().__init__(config, config)
