"""What a distillation method decides: which text each sample is trained on, and the loss of every token.

A method sees one micro-batch as flat supervised positions (``Targets``) and returns an unreduced loss. Masks, the token
count and its normalisation over the global batch belong to the trainer, so no method can get them wrong differently.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor

from distill.config import in_range, one_of
from distill.kernels import divergence

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "alpha", "tvd")


class Source(Enum):
    """Whose text a sample is trained on."""

    REFERENCE = "reference"
    TEACHER = "teacher"
    STUDENT = "student"


@dataclass(frozen=True, slots=True)
class Targets:
    """Supervised positions of one micro-batch. T positions, V shared vocabulary."""

    student_logits: Tensor  # [T, V_s], with gradient
    teacher_logits: Tensor | None  # [T, V_t]
    token_ids: Tensor  # [T] the token that follows


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Unreduced loss and monitoring figures of each supervised token."""

    loss: Tensor  # [T] fp32
    stats: dict[str, Tensor] = field(default_factory=dict)  # name -> [T] fp32, no gradient


@dataclass(kw_only=True)
class DivergenceSpec:
    """Which divergence, and how it is computed; see ``distill.kernels.divergence``."""

    kind: str = "forward_kl"
    beta: float = 0.5
    alpha: float | None = None  # None: the kind's own default
    temperature: float = 1.0
    path: str = "auto"
    top_k: int = (
        0  # of the top-k agreement and entropy in the log; 0 leaves them out (on CPU they cost a sort of every row)
    )

    def __post_init__(self) -> None:
        one_of("method.divergence.kind", self.kind, KINDS)
        one_of("method.divergence.path", self.path, ("auto", "triton", "torch"))
        in_range("method.divergence.beta", self.beta, low=0.0, high=1.0)
        in_range("method.divergence.temperature", self.temperature, low=1e-3)
        in_range("method.divergence.top_k", self.top_k, low=0)

    def __call__(self, targets: Targets) -> TokenLosses:
        """Divergence of every supervised position, with its monitoring figures from the same pass."""
        assert targets.teacher_logits is not None
        output = divergence(
            targets.student_logits,
            targets.teacher_logits,
            kind=self.kind,
            temperature=self.temperature,
            beta=self.beta,
            alpha=self.alpha,
            path=self.path,
            stats=True,
            token_ids=targets.token_ids,
            top_k=self.top_k,
        )
        return TokenLosses(output.loss, dict(output.stats or {}))


@dataclass(kw_only=True)
class TextSpec:
    """Common option of methods that train on text which the student did not write."""

    name: str = "sft"
    text: str = "reference"

    def __post_init__(self) -> None:
        one_of("method.text", self.text, ("reference", "teacher"))


class Method(ABC):
    """A distillation method; ``Config`` is the dataclass behind its YAML in ``conf/method/``."""

    Config: ClassVar[type[Any]]
    needs_teacher: bool = True  # its loss reads the teacher's logits

    @abstractmethod
    def source(self, sample: int, seed: int) -> Source:
        """Whose text global sample number ``sample`` is trained on: a pure function, the same on any world size."""

    @abstractmethod
    def token_losses(self, targets: Targets) -> TokenLosses:
        """The loss of every supervised position of a micro-batch (T may be 0)."""

    def uses(self) -> set[Source]:
        """All the sources this method can ask for."""
        return {self.source(0, 0)}
