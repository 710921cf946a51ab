"""Supervised fine-tuning: ``L = −Σ_t log q(y_t | y_<t)`` on reference text, or on text the teacher writes.

The latter is sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947). Options: ``conf/method/sft.yaml``.
"""

from __future__ import annotations

from distill.methods.base import Method, Source, Targets, TextSpec, TokenLosses


class Sft(Method):
    Config = TextSpec
    needs: frozenset[str] = frozenset()
    reads = frozenset({"tokens"})

    def __init__(self, config: TextSpec) -> None:
        self.config = config

    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        return Source(self.config.text)

    def token_losses(self, targets: Targets) -> TokenLosses:
        output = targets.nll()
        return TokenLosses(output.loss, dict(output.stats or {}))
