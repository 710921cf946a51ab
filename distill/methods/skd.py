"""SKD: step-level speculative distillation, the baseline of that name in MOTAB (arXiv 2605.19433), after Xu et al. 2024.

The student proposes a step; it stands where mean p_T(y_i) > γ·mean p_S(y_i) over its tokens (arithmetic means), otherwise the
teacher writes that step in its place and the student goes on. So it is the monitored engine with the ratio as value, a boundary
that does not depend on entropy, no rewinding past the rejected step, and no limit to the number of corrections; the rejected
step leaves no trace in the text. (The original SKD, arXiv 2410.11325, decides token by token.) Options: ``conf/method/skd.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from distill.config import in_range
from distill.methods.motab import MonitoredLoss, MonitoredMethod
from distill.rollouts.monitored_options import MonitorOptions


@dataclass(kw_only=True)
class SkdConfig(MonitoredLoss):
    name: str = "skd"
    gamma: float = 0.9
    delimiters: list[str] = field(default_factory=lambda: [".\n\n"])
    step_tokens: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("method.gamma", self.gamma, low=0.0)


class Skd(MonitoredMethod):
    Config = SkdConfig

    def __init__(self, config: SkdConfig) -> None:
        options = MonitorOptions(
            value="student_ratio",
            epsilon=config.gamma,
            theta=0.0,
            delimiters=config.delimiters,
            step_tokens=config.step_tokens,
            rewind="step",
            max_breaches=0,
            keep_flawed=False,
        )
        super().__init__(config, options)
