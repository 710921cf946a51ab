"""OPSDC, later CRISP (arXiv 2603.05433): a model teaches itself to be brief.

    L = Σ_t KL( q(·|x, y_<t) ‖ q̄(·|x, c, y_<t) ),      y ~ q(·|x),      q̄ ← q every M steps

The teacher q̄ is a frozen copy of the student that reads the prompt with the instruction c ("be concise") in front; the
student never sees c. No answers are checked and no rollout is dropped. The paper divides the loss by |y|
(``train.aggregation.kind=sequence_mean``).

Evidence: loss, M = 50 (30 to 60 are stable, 1 collapses, a teacher that never changes compresses least), and both
instructions below exact, from the paper and its code, except for the lines about the answer format, which belong to the
data. Reverse KL is the method; forward KL (collapses in the paper) and jsd are there for that ablation. Options:
``conf/method/opsdc.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from distill.config import in_range
from distill.data.example import Example, Prompt
from distill.errors import ConfigError
from distill.methods.base import DivergenceSpec, Method, Source, Targets, TokenLosses

TEMPLATES = {
    "concise": (
        "Solve the following math problem concisely and correctly. Be direct — avoid unnecessary elaboration, redundant "
        "steps, or restating the problem. Focus only on the key reasoning steps needed to reach the answer.\n\n{prompt}"
    ),
    "fewer_tokens": (
        "Solve the following math problem correctly using {percent}% fewer tokens than you normally would. Be more "
        "concise — cut unnecessary elaboration, redundant steps, and verbose explanations while preserving "
        "correctness.\n\n{prompt}"
    ),
}


@dataclass(kw_only=True)
class OpsdcConfig:
    name: str = "opsdc"
    template: str = "concise"
    percent: int = 50
    refresh: int = 50
    divergence: DivergenceSpec = field(default_factory=lambda: DivergenceSpec(kind="reverse_kl"))

    def __post_init__(self) -> None:
        in_range("method.percent", self.percent, low=1, high=99)
        in_range("method.refresh", self.refresh, low=0)
        if "{prompt}" not in TEMPLATES.get(self.template, self.template):
            raise ConfigError(
                f"method.template={self.template!r} is neither one of {', '.join(TEMPLATES)} nor a text with '{{prompt}}' in it, "
                "which stands for the prompt"
            )


class Opsdc(Method):
    Config = OpsdcConfig
    reads = frozenset({"divergence"})

    def __init__(self, config: OpsdcConfig) -> None:
        self.config = config
        self.self_teacher = config.refresh
        self._template = TEMPLATES.get(config.template, config.template).replace("{percent}", str(config.percent))

    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        return Source.STUDENT

    def teacher_view(self, example: Example) -> Example:
        return replace(example, prompt=instructed(example.prompt, self._template))

    @property
    def signals(self) -> frozenset[str]:
        return self.config.divergence.signals

    def token_losses(self, targets: Targets) -> TokenLosses:
        return self.config.divergence(targets)


def instructed(prompt: Prompt, template: str) -> Prompt:
    """The prompt put into the template; of a chat, the last turn."""
    if isinstance(prompt, str):
        return template.replace("{prompt}", prompt)
    return [*prompt[:-1], {**prompt[-1], "content": template.replace("{prompt}", prompt[-1]["content"])}]
