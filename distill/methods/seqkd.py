"""Sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947): ``L = −Σ_t log q(ŷ_t | ŷ_<t)`` with ŷ ~ teacher.

Cross-entropy on what the teacher writes: the one-sample estimate of KL(p ‖ q) between whole sequences. The paper takes the
teacher's beam-search mode; ŷ is drawn here with ``rollout.temperature`` (0: greedy), as reasoning-model distillation does.
Equal to ``method=sft method.text=teacher``; the name exists so that a comparison can say which baseline it ran.
Options: ``conf/method/seqkd.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.config import one_of
from distill.methods.base import TextSpec
from distill.methods.sft import Sft


@dataclass(kw_only=True)
class SeqKdConfig(TextSpec):
    name: str = "seqkd"
    text: str = "teacher"

    def __post_init__(self) -> None:
        one_of("method.text", self.text, ("teacher",))


class SeqKd(Sft):
    Config = SeqKdConfig
