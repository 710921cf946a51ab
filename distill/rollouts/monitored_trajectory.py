"""One monitored trajectory while it grows: what the models condition on, and the text that a student is trained on.

The two differ. The models continue from *accepted* tokens only: after a breach both go back to the start of step t*, and the
teacher writes on from there without seeing the flaw. The *text* may keep the flawed steps and a revise marker before the
teacher's part ("asymmetric stitching", MOTAB Eq. 11), so that a student learns to recover from its own mistakes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.errors import ConfigError
from distill.rollouts.boundary import steepest_drop
from distill.rollouts.monitored_options import MonitorOptions
from distill.rollouts.rollout import Finish, Trajectory

_TAIL = 16
"""Tokens decoded to see what a text ends with; white space is short."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the student as the teacher judged it; ``entropy`` (nats) is the teacher's where the step begins."""

    ids: list[int]
    value: float
    boundary: float
    entropy: float
    breach: bool


@dataclass(frozen=True, slots=True)
class Takeover:
    """The teacher wrote ``tokens`` tokens in place of the steps from ``rewound_to`` to ``step`` (both counted from 1 over all
    steps judged). 0 tokens: the context had no room for a correction, and the student's steps stand.
    """

    step: int
    rewound_to: int
    tokens: int


@dataclass(frozen=True, slots=True)
class MonitoredTrajectory(Trajectory):
    """A finished trajectory; ``ids`` is the stitched response (see the module)."""

    prompt_ids: list[int] = field(default_factory=list)
    finish: Finish = "length"
    steps: list[Step] = field(default_factory=list)
    takeovers: list[Takeover] = field(default_factory=list)
    teacher_share: float = 0.0


class Marker:
    """The revise marker as tokens, encoded once: text is never encoded again."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        """Raises ConfigError for a marker that the tokenizer cannot write."""
        self._tokenizer, self.text = tokenizer, text
        self._space = len(text) - len(text.lstrip())
        self._ids = [self._encode(text[skipped:]) for skipped in range(self._space + 1)]

    def after(self, ids: Sequence[int]) -> list[int]:
        """The marker's tokens behind ``ids``; white space at its beginning that the text already ends with is left out."""
        tail = self._tokenizer.decode(list(ids[-_TAIL:]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        skipped = next(n for n in range(self._space, -1, -1) if str(tail).endswith(self.text[:n]))
        return self._ids[skipped]

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception:  # the tokenizers library raises bare Exception for an unknown symbol
            ids = []
        if "".join(str(self._tokenizer.decode(ids)).split()) != "".join(text.split()):
            raise ConfigError(
                f"method.marker={self.text!r} cannot be written with this tokenizer; choose a marker of its own tokens, "
                "or method.keep_flawed=false"
            )
        return ids


class Draft:
    """A trajectory in the making. ``row`` and ``monitor`` are its rows in the student's and the teacher's session."""

    def __init__(self, index: int, prompt: list[int], seed: int, row: int, monitor: int) -> None:
        self.index, self.prompt, self.seed, self.row, self.monitor = index, prompt, seed, row, monitor
        self.accepted: list[int] = []
        self.text: list[int] = []
        self.supervised: list[bool] = []
        self.steps: list[Step] = []
        self.takeovers: list[Takeover] = []
        self._first = 0  # the first step since the last takeover: what the teacher wrote is never taken back
        self._by_teacher = self._by_student = 0  # tokens of the text
        self._wrote = [0, 0]  # tokens that the student and the teacher generated, kept or not

    def judge(self, step: Step) -> None:
        """Note a step's verdict; `accept` or `take_back` says what becomes of it."""
        self.steps.append(step)
        self._wrote[0] += len(step.ids)

    def accept(self) -> None:
        """The last step judged stands."""
        self._write(self.steps[-1].ids, by_teacher=False)

    def target(self, options: MonitorOptions) -> int:
        """t* of the last step judged, a breach: the index in ``steps`` from which the teacher takes over."""
        stretch = self.steps[self._first :]
        if options.rewind == "step":
            return len(self.steps) - 1
        values, limits = np.array([s.value for s in stretch]), np.array([s.boundary for s in stretch])
        return self._first + steepest_drop(values, limits)

    def kept(self, target: int) -> int:
        """Accepted tokens before step index ``target``."""
        return len(self.accepted) - sum(len(step.ids) for step in self.steps[target:-1])

    def flawed_text(self, marker: Marker, eos: set[int]) -> tuple[list[int], list[int]]:
        """The text with the flawed step and without an end token, and the marker that follows it."""
        text = self.text + self.steps[-1].ids
        if text[-1] in eos:
            text = text[:-1]
        return text, marker.after(text)

    def take_back(self, target: int, flawed: tuple[list[int], list[int]] | None, mask: bool) -> None:
        """Go back to before step index ``target``; with ``flawed`` (see `flawed_text`) the text keeps what is taken back."""
        kept = self.kept(target)
        dropped = len(self.accepted) - kept
        start = len(self.text) - dropped  # since the last takeover, text and accepted tokens grow alike
        del self.accepted[kept:], self.supervised[start:]
        if flawed is None:
            del self.text[start:]
            self._by_student -= dropped
        else:
            text, marker = flawed
            self.supervised += [not mask] * (len(text) - start) + [True] * len(marker)
            self._by_student += len(text) - len(self.text)
            self.text = text + marker

    def take_over(self, target: int, ids: list[int]) -> None:
        """The teacher's tokens in place of the steps from index ``target`` on."""
        self.takeovers.append(Takeover(len(self.steps), target + 1, len(ids)))
        self._first = len(self.steps)
        self._wrote[1] += len(ids)
        self._write(ids, by_teacher=True)

    def forgo(self, target: int) -> None:
        """Note a breach that is not corrected."""
        self.takeovers.append(Takeover(len(self.steps), target + 1, 0))

    def _write(self, ids: list[int], by_teacher: bool) -> None:
        self.accepted += ids
        self.text += ids
        self.supervised += [True] * len(ids)
        if by_teacher:
            self._by_teacher += len(ids)
        else:
            self._by_student += len(ids)

    def done(self, finish: Finish) -> MonitoredTrajectory:
        """The finished trajectory. Its notes: means over the steps judged of ``value``, ``boundary`` and ``entropy``; ``breach``
        (0 or 1); ``rewind``, the mean of t − t* over its breaches; tokens generated by either model; ``teacher_share`` of the
        text's tokens without the marker; ``uncorrected`` breaches.
        """
        share = self._by_teacher / max(self._by_teacher + self._by_student, 1)
        judged = max(len(self.steps), 1)
        notes = {name: sum(getattr(s, name) for s in self.steps) / judged for name in ("value", "boundary", "entropy")}
        notes |= {
            "steps": float(len(self.steps)),
            "breach": float(bool(self.takeovers)),
            "uncorrected": float(sum(not t.tokens for t in self.takeovers)),
            "student_tokens": float(self._wrote[0]),
            "teacher_tokens": float(self._wrote[1]),
            "teacher_share": share,
        }
        if self.takeovers:
            notes["rewind"] = sum(t.step - t.rewound_to for t in self.takeovers) / len(self.takeovers)
        return MonitoredTrajectory(
            ids=self.text,
            supervised=None if all(self.supervised) else self.supervised,
            finished=finish != "length",
            notes=notes,
            prompt_ids=self.prompt,
            accepted_ids=self.accepted,
            finish=finish,
            steps=self.steps,
            takeovers=self.takeovers,
            teacher_share=share,
        )
