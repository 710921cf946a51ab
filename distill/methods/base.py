"""What a distillation method decides: which text each sample is trained on, what counts in it, and the loss of every token.

A method sees one micro-batch as flat supervised positions (``Targets``) and returns an unreduced loss. Masks, the sum over
tokens and its normalisation over the global batch (``distill.aggregation``) belong to the trainer, so no method can get them
wrong differently. All hooks but ``source`` and ``token_losses`` have a default that leaves things as they are:

    source → (text is made) → supervise → teacher_view → weigh → token_losses
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import RunConfig, in_range, one_of
from distill.data.example import Example
from distill.data.tokenize import TokenSequence
from distill.kernels import (
    DivergenceOutput,
    divergence,
    linear_divergence,
    sampled_reverse_kl,
    sparse_divergence,
    token_nll,
)
from distill.teachers.signals import FullLogits, HiddenStates, SampledToken, Signal, TopK
from distill.vocabulary.divergence import SplitStates, split_divergence
from distill.wire import travels

if TYPE_CHECKING:
    from distill.rollouts.rollout import Trajectory

WHOLE = frozenset({"logits", "hidden"})  # signals that hold the whole distribution
StudentSignal = FullLogits | HiddenStates | SplitStates
KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "alpha", "tvd")


@travels
class Source(Enum):
    """Whose text a sample is trained on."""

    REFERENCE = "reference"
    TEACHER = "teacher"
    STUDENT = "student"
    MONITORED = "monitored"  # written by the student under a teacher that may take over (``Method.writer``)


@dataclass(frozen=True, slots=True)
class Targets:
    """Supervised positions of one micro-batch. T positions, V shared vocabulary.

    The trainer fills every field that the method asked for; those it did not ask for are None.
    """

    student: StudentSignal  # with gradient
    teacher: Signal | None  # where "teacher" is in ``Method.needs``
    token_ids: Tensor  # [T] the token that follows
    reference: Signal | None = None  # where "reference" is in ``Method.needs``
    sequence_index: Tensor | None = None  # [T] int64: which sequence of the micro-batch (whole sequences, never split)
    advantages: Tensor | None = None  # [T] fp32: the ``Weight.advantage`` of the token's sequence
    behaviour_logprobs: Tensor | None = None  # [T] fp32: log-probability when it was written; NaN in text that was not
    draws: Tensor | None = None  # [T] fp32 uniform in [0, 1), the same in any layout; where ``Method.draws``
    progress: float = 0.0  # optimizer steps done / all steps of the run, in [0, 1)
    scales: Tensor | None = (
        None  # [T] fp32: what the trainer multiplies the losses by, up to one number; None: not known
    )

    def nll(self, stats: bool = True) -> DivergenceOutput:
        """−log q ``[T]`` of the tokens that follow, with the figures of `token_nll`."""
        logits, options = self.student.operand()
        return token_nll(logits, self.token_ids, stats=stats, **options)

    @property
    def student_logits(self) -> Tensor:
        """``[T, V_s]``, with gradient. Computed at each call where the student comes as hidden states."""
        return self.student.logits()

    @property
    def teacher_logits(self) -> Tensor | None:
        """``[T, V_t]``, computed at each call for hidden states; None for a method that does not read the teacher."""
        return None if self.teacher is None else self.teacher.logits()

    @property
    def reference_logits(self) -> Tensor | None:
        """As ``teacher_logits``."""
        return None if self.reference is None else self.reference.logits()


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Unreduced loss and monitoring figures of each supervised token."""

    loss: Tensor  # [T] fp32
    stats: dict[str, Tensor] = field(default_factory=dict)  # name -> [T] fp32, no gradient


@travels
@dataclass(frozen=True, slots=True)
class SequenceFacts:
    """What every rank knows of one sequence of the global batch before the losses are computed."""

    sample: int  # global sample number
    group: int  # global prompt number: the ``samples_per_prompt`` sequences of one prompt share it
    source: Source
    tokens: int  # supervised tokens; may be 0
    length: int  # tokens of the response
    correct: float | None = None  # the verifier's verdict of a text that was written for this step; None: not judged
    probed: float | None = None  # share of correct answers among ``probe_rollouts``; None without them
    words: int = 0  # epistemic words in a text that the student wrote
    notes: dict[str, float] = field(default_factory=dict)  # ``TokenSequence.notes``


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """The global batch of one step: all ranks, all micro-batches, in the order of the sample numbers."""

    sequences: Sequence[SequenceFacts]
    progress: float = 0.0

    def groups(self) -> dict[int, list[int]]:
        """group → positions in ``sequences``. Skipped samples are absent, so a group may be smaller than asked for."""
        members: dict[int, list[int]] = {}
        for position, sequence in enumerate(self.sequences):
            members.setdefault(sequence.group, []).append(position)
        return members

    def pass_rates(self) -> list[float | None]:
        """Per sequence: the probed share of correct answers; without probes the share in its group; None if not judged."""
        rates: list[float | None] = [sequence.probed for sequence in self.sequences]
        for members in self.groups().values():
            judged = [c for c in (self.sequences[i].correct for i in members) if c is not None]
            share = sum(judged) / len(judged) if judged else None
            for i in members:
                rates[i] = share if rates[i] is None else rates[i]
        return rates


@dataclass(frozen=True, slots=True)
class Weight:
    """What a method makes of one sequence: ``weight`` scales its loss, ``advantage`` goes to ``Targets.advantages``."""

    weight: float = 1.0
    advantage: float = 1.0


class Writer(Protocol):
    """Makes the trajectories of ``Source.MONITORED`` samples."""

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Sequence[Trajectory]:
        """One trajectory per prompt, in order; each depends on its prompt, its seed and the weights only."""


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

    @property
    def signals(self) -> frozenset[str]:
        """Kinds of teacher signal that this divergence can be computed from."""
        if self.temperature != 1.0:  # what is known in part cannot be tempered
            return WHOLE
        return WHOLE | {"topk"} | ({"sampled"} if self.kind == "reverse_kl" else set())

    def __call__(self, targets: Targets) -> TokenLosses:
        """Divergence of every supervised position, with its monitoring figures from the same pass."""
        output = self._of_signal(targets)
        return TokenLosses(output.loss, dict(output.stats or {}))

    def _of_signal(self, targets: Targets) -> DivergenceOutput:
        student, teacher = targets.student, targets.teacher
        options: dict[str, Any] = {"beta": self.beta, "alpha": self.alpha, "path": self.path, "stats": True}
        if isinstance(teacher, SampledToken):
            logits, form = student.operand()
            ids = teacher.known_ids(targets.token_ids)
            return sampled_reverse_kl(logits, ids, teacher.logprobs, path=self.path, **form)
        if isinstance(teacher, TopK):
            logits, form = student.operand()
            return sparse_divergence(logits, teacher.ids, teacher.logprobs, self.kind, **form, **options)
        assert teacher is not None
        if isinstance(teacher, HiddenStates) and not isinstance(student, FullLogits):
            return self._of_hidden(student, teacher, targets)
        whole = {"token_ids": targets.token_ids, "top_k": self.top_k}
        return divergence(student.logits(), teacher.logits(), self.kind, self.temperature, **options, **whole)

    def _of_hidden(
        self, student: HiddenStates | SplitStates, teacher: HiddenStates, targets: Targets
    ) -> DivergenceOutput:
        """From hidden states on both sides. Where the trainer's factors are known, the gradient is formed with the loss."""
        kind = {
            "kind": self.kind,
            "temperature": self.temperature,
            "beta": self.beta,
            "alpha": self.alpha,
            "path": self.path,
        }
        if isinstance(student, SplitStates):
            return split_divergence(student, teacher, targets.token_ids, targets.scales, kind)
        ours, theirs = student.head, teacher.head
        return linear_divergence(
            student.hidden.to(ours.weight.dtype),
            ours.weight,
            teacher.hidden.to(theirs.weight.dtype),
            theirs.weight,
            stats=True,
            gradient="recompute" if targets.scales is None else "forward",
            upstream=targets.scales,
            budget_bytes=student.budget,
            token_ids=targets.token_ids,
            top_k=self.top_k,
            student_bias=ours.bias,
            teacher_bias=theirs.bias,
            student_scale=ours.scale,
            teacher_scale=theirs.scale,
            student_softcap=ours.softcap,
            teacher_softcap=theirs.softcap,
            **kind,
        )


@dataclass(kw_only=True)
class TextSpec:
    """Common option of methods that train on text which the student did not write."""

    name: str = "sft"
    text: str = "reference"

    def __post_init__(self) -> None:
        one_of("method.text", self.text, ("reference", "teacher"))


class Method(ABC):
    """A distillation method; ``Config`` is the dataclass behind its YAML in ``conf/method/``.

    The attributes may be set per class, or per instance where they follow from its options.
    """

    Config: ClassVar[type[Any]]
    needs: frozenset[str] = frozenset({"teacher"})  # of {"teacher", "reference"}: whom token_losses reads
    samples_per_prompt: int = 1  # consecutive samples share a prompt
    self_teacher: int | None = (
        None  # the teacher is a frozen copy of the student, renewed every so many steps (0: never)
    )
    probe_rollouts: int = 0  # the student answers every prompt this often, before the step, to learn its pass rate
    draws: bool = False  # token_losses reads ``Targets.draws``
    # Of {"divergence", "tokens", "logits"}: what token_losses computes from the student. "divergence": `DivergenceSpec`, whose
    # loss it may multiply by one number; "tokens": log-probabilities of given tokens; "logits": anything else.
    reads: frozenset[str] = frozenset({"logits"})

    @property
    def signals(self) -> frozenset[str]:
        """Kinds of teacher signal (``distill.teachers.signals``) that ``token_losses`` can learn from."""
        return WHOLE

    @abstractmethod
    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        """Whose text global sample number ``sample`` is trained on: a pure function, the same on any world size.

        ``progress`` is that of the step (see ``Targets``), for methods in stages.
        """

    def uses(self) -> set[Source]:
        """All the sources this method can ask for."""
        return {self.source(0, 0)}

    def writer(
        self, student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig
    ) -> Writer:
        """Who writes ``Source.MONITORED`` samples; asked for once, then used with the weights as they are at each call."""
        raise NotImplementedError(f"{type(self).__name__} asks for monitored text but has no writer")

    def supervise(self, sequence: TokenSequence, tokenizer: PreTrainedTokenizerBase) -> TokenSequence:
        """Which tokens of a sequence count (``supervised``), or a shorter sequence. Its prompt must stay."""
        return sequence

    def teacher_view(self, example: Example) -> Example | None:
        """The example whose prompt the teacher sees before the same response; None: the student's prompt."""
        return None

    def weigh(self, facts: BatchFacts) -> Sequence[Weight]:
        """One weight per sequence of ``facts`` (the whole global batch), computed alike on every rank."""
        return [Weight()] * len(facts.sequences)

    @abstractmethod
    def token_losses(self, targets: Targets) -> TokenLosses:
        """The loss of every supervised position of a micro-batch (T may be 0)."""
