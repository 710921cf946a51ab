"""Several teachers, each for samples of its own (as in ORBIT, arXiv 2601.08310): a sample's tag names its teacher.

    teacher.many: {math: {path: A, tags: [gsm8k, aime], weight: 1.0}, sums: {path: B}}     teacher.route: task

``teacher.route`` is a key of ``Example.metadata``; its value is a teacher's name or one of its tags. The name travels with the
sequence (``TokenSequence.tag``). ``Routed`` splits each micro-batch, asks each teacher about its own sequences and puts the
answers together in the order of the batch. ``weight`` multiplies the loss of a teacher's samples. Per teacher the log has
``teacher/NAME/tokens`` and ``teacher/NAME/loss`` (mean per supervised token), and whatever its placement measures.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from distill.config import TeacherSection
from distill.data.batch import TokenBatch, collate
from distill.data.example import Example
from distill.errors import ConfigError, DataError, TeacherLost
from distill.methods import Method, Targets, TokenLosses
from distill.progress import say
from distill.teachers.signals import FullLogits, Head, HiddenStates, Parts, SampledToken, Signal, TopK

if TYPE_CHECKING:
    from distill.teachers.base import Scorer

SUMMED = ("bytes", "request_bytes", "wait_s")  # figures of the teachers that add up to one of all


class Route:
    """Which teacher each sample has, and what its samples weigh."""

    def __init__(self, section: TeacherSection) -> None:
        self.key = section.route
        self.weights = {name: source.weight for name, source in section.many.items()}
        self._teachers = {name: name for name in section.many}
        for name, source in section.many.items():
            for tag in source.tags:
                if self._teachers.setdefault(tag, name) != name:
                    raise ConfigError(
                        f"teacher.many: the tag '{tag}' is claimed by '{self._teachers[tag]}' and by '{name}'; a sample has "
                        "one teacher (teacher.mixture=mean asks all of them about every sample)"
                    )

    def teacher_of(self, example: Example) -> str:
        """The name of the sample's teacher. Raises DataError naming sample, tag and teachers."""
        tag = example.metadata.get(self.key)
        name = None if tag is None else self._teachers.get(str(tag))
        if name is not None:
            return name
        what = f"{self.key}={tag}" if tag is not None else f"no '{self.key}' in its metadata"
        known = "; ".join(
            f"{name} ({', '.join(t for t, owner in self._teachers.items() if owner == name)})" for name in self.weights
        )
        raise DataError(
            f"sample {example.id} has {what}, and no teacher of teacher.many is for that: {known}. Add the tag to a teacher's "
            "`tags`, set teacher.route to the key that holds the tags, or leave such samples out of the data"
        )


def check_many(section: TeacherSection) -> None:
    """Raises ConfigError for a ``teacher.many`` that cannot work."""
    for name in section.many:
        if name in ("student", "teacher", "reference") or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ConfigError(
                f"teacher.many: '{name}' cannot be a teacher's name; take letters, digits, _ . and -, and not student, teacher or "
                "reference"
            )
    for name, source in section.many.items():
        if source.url and section.placement != "server":
            raise ConfigError(
                f"teacher.many.{name}.url={','.join(source.url)} is a server, and teacher.placement={section.placement}; set "
                "teacher=server, or leave the url out"
            )
    if not section.many or section.mixture == "route":
        Route(section)
        return
    if not any(source.weight for source in section.many.values()):
        raise ConfigError(
            "teacher.mixture=mean: every weight in teacher.many is 0; give at least one teacher a weight above 0"
        )
    if tagged := [name for name, source in section.many.items() if source.tags]:
        raise ConfigError(
            f"teacher.many.{tagged[0]}.tags: with teacher.mixture=mean every teacher is asked about every sample; remove the tags, "
            "or set teacher.mixture=route"
        )


def ranks_of_teachers(names: Sequence[str], ranks: int) -> dict[str, list[int]]:
    """Which of ``ranks`` teacher ranks (0 …) hold which teacher: each as many as the others, one more for the first; where there
    are fewer ranks than teachers, a rank holds several."""
    if ranks >= len(names):
        return {name: list(range(number, ranks, len(names))) for number, name in enumerate(names)}
    return {name: [number % ranks] for number, name in enumerate(names)}


class Several:
    """What `Routed` and `distill.teachers.mixture.Mixed` share: scorers by name, some of which may be lost on the way.

    ``continues`` (``teacher.on_loss=continue``): a scorer that raises TeacherLost is not asked again; without any left, or
    otherwise, the error ends the run.
    """

    def __init__(self, scorers: Mapping[str, Scorer], continues: bool) -> None:
        self.scorers, self.continues = dict(scorers), continues
        self.lost: set[str] = set()
        self.ahead = any(scorer.ahead for scorer in self.scorers.values())
        self.may_be_lost = any(scorer.may_be_lost for scorer in self.scorers.values())

    def asked(self) -> dict[str, Scorer]:
        """Those that are left."""
        return {name: scorer for name, scorer in self.scorers.items() if name not in self.lost}

    def ask(self, name: str, batch: TokenBatch) -> Signal | None:
        """What a teacher says about its part of a micro-batch; None once it is lost."""
        try:
            return None if name in self.lost else self.scorers[name].take(batch)
        except TeacherLost as error:
            if not self.continues or len(self.asked()) == 1:
                raise
            self.lost.add(name)
            say(f"[bold]teacher '{name}' is lost[/bold] ({error}); {self.consequence(name)} (teacher.on_loss=continue)")
            return None

    def consequence(self, name: str) -> str:
        """What follows from the loss of a teacher, for the log."""
        raise NotImplementedError

    def figures(self) -> dict[str, float]:
        """Each teacher's figures under its name, the sum of those that add up, and ``lost`` teachers."""
        figures = {"lost": float(len(self.lost)), "lost#": 1.0}
        for name, scorer in self.scorers.items():
            for key, value in scorer.figures().items():
                figures[f"{name}/{key}"] = value
                if key in SUMMED:
                    figures[key] = figures.get(key, 0.0) + value
        return figures

    def recover(self) -> bool:
        return all([scorer.recover() for scorer in self.asked().values()])  # noqa: C419  (all of them are to know)

    def close(self) -> None:
        for scorer in self.scorers.values():
            scorer.close()


class Routed(Several):
    """A ``Scorer`` that asks each teacher about its own sequences. Every teacher is asked once per micro-batch, if only about
    nothing: placements that need all ranks see the same calls on each."""

    def __init__(self, scorers: Mapping[str, Scorer], continues: bool = False) -> None:
        super().__init__(scorers, continues)
        self._waiting: deque[tuple[TokenBatch, dict[str, _Share]]] = deque()

    def submit(self, batches: Sequence[TokenBatch]) -> None:
        shares = [_split(batch, self.scorers) for batch in batches]
        self._waiting.extend(zip(batches, shares, strict=True))
        for name, scorer in self.asked().items():
            scorer.submit([share[name].batch for share in shares])

    def take(self, batch: TokenBatch) -> Signal:
        oldest, shares = self._waiting.popleft()
        assert oldest is batch, "signals are taken in the order in which they were asked for"
        answers = {name: self.ask(name, share.batch) for name, share in shares.items()}
        kind = next(answer.kind for answer in answers.values() if answer is not None)
        return joined(
            [
                (shares[name].places, silence(kind, shares[name].batch) if a is None else a)
                for name, a in answers.items()
            ]
        )

    def consequence(self, name: str) -> str:
        return "its samples no longer count"

    def silent(self, batch: TokenBatch) -> Tensor | None:
        """``[T]`` bool: positions of a batch that was taken whose teacher is lost; None: no teacher is."""
        if not self.lost:
            return None
        flags = torch.tensor([sequence.tag in self.lost for sequence in batch.sequences] or [False])
        return flags.to(batch.sequence_index.device)[batch.sequence_index]

    def cancel(self) -> None:
        self._waiting.clear()
        for scorer in self.asked().values():
            scorer.cancel()


def silence(kind: str, batch: TokenBatch) -> Signal:
    """A signal about the batch's T positions that no divergence learns anything from."""
    rows, device = len(batch.target_ids), batch.input_ids.device
    nothing = torch.zeros(rows, 1, device=device)
    if kind == "sampled":
        return SampledToken(nothing.squeeze(1), torch.zeros(rows, dtype=torch.bool, device=device))
    if kind == "topk":
        return TopK(torch.full((rows, 1), -1, device=device), nothing - torch.inf)
    return HiddenStates(nothing, Head(torch.zeros(1, 1, device=device)))  # a vocabulary of one: everybody is sure of it


@dataclass(frozen=True, slots=True)
class _Share:
    """One teacher's part of a micro-batch: its targets are ``places`` [t] of the whole one's T, ascending."""

    batch: TokenBatch
    places: Tensor


def _split(batch: TokenBatch, names: Mapping[str, Scorer]) -> dict[str, _Share]:
    assert len(batch.sequences) == len(batch.example_ids), "a batch of this process"
    members: dict[str, list[int]] = {name: [] for name in names}
    for number, sequence in enumerate(batch.sequences):
        assert sequence.tag is not None, "the samples of several teachers have tags"
        members[sequence.tag].append(number)
    return {name: _share(batch, chosen) for name, chosen in members.items()}


def _share(batch: TokenBatch, chosen: list[int]) -> _Share:
    device = batch.input_ids.device
    if len(chosen) == len(batch.sequences):
        return _Share(batch, torch.arange(len(batch.target_ids), device=device))
    mine = torch.zeros(len(batch.sequences), dtype=torch.bool)
    mine[chosen] = True
    sequences = [batch.sequences[number] for number in chosen]
    longest = max((len(sequence.ids) for sequence in sequences), default=1)
    part = collate(sequences, 0, longest if batch.attention_mask is None else None).to(device)
    return _Share(part, torch.nonzero(mine.to(device)[batch.sequence_index]).squeeze(1))


def joined(parts: Sequence[tuple[Tensor, Signal]]) -> Signal:
    """Signals of one kind, each for places ``[t]`` of its own, as one for all T positions."""
    filled = [(places, signal) for places, signal in parts if len(places)]
    if len(filled) <= 1:
        return filled[0][1] if filled else parts[0][1]
    order = torch.cat([places for places, _ in filled]).argsort()
    signals = [signal for _, signal in filled]
    if isinstance(signals[0], SampledToken):
        tokens = [signal for signal in signals if isinstance(signal, SampledToken)]
        known = [
            torch.ones(len(t), dtype=torch.bool, device=order.device) if t.known is None else t.known for t in tokens
        ]
        return SampledToken(torch.cat([token.logprobs for token in tokens])[order], torch.cat(known)[order])
    if isinstance(signals[0], TopK):
        lists = [signal for signal in signals if isinstance(signal, TopK)]
        return TopK(
            _widened([x.ids for x in lists], -1)[order], _widened([x.logprobs for x in lists], -torch.inf)[order]
        )
    return Parts([(places, signal) for places, signal in filled if isinstance(signal, FullLogits | HiddenStates)])


def _widened(tensors: Sequence[Tensor], fill: float) -> Tensor:
    """Tensors ``[t, K]`` end to end, narrower ones filled up."""
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([functional.pad(tensor, (0, width - tensor.shape[1]), value=fill) for tensor in tensors])


def losses_by_teacher(method: Method, targets: Targets) -> TokenLosses:
    """``method.token_losses``, for each teacher's positions apart where their heads or vocabularies differ."""
    teacher = targets.teacher
    if not isinstance(teacher, Parts):
        return method.token_losses(targets)
    made = [method.token_losses(_at(targets, places, signal)) for places, signal in teacher.parts]
    stats = {name: teacher.joined([losses.stats[name] for losses in made]) for name in made[0].stats}
    return TokenLosses(teacher.joined([losses.loss for losses in made]), stats)


def _at(targets: Targets, places: Tensor, teacher: Signal) -> Targets:
    """The positions ``places`` of a micro-batch, with what their teacher says about them."""
    values = {field.name: getattr(targets, field.name) for field in fields(targets)}
    chosen = {name: _rows(value, places) for name, value in values.items()}
    return replace(targets, **{**chosen, "teacher": teacher})


def _rows(value: Any, places: Tensor) -> Any:
    """A tensor ``[T, …]``, or a signal, whose tensors are such, at ``places``; anything else as it is."""
    if isinstance(value, Tensor):
        return value[places]
    if not is_dataclass(value) or isinstance(value, type | Parts):
        return value
    tensors = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(value, **{name: tensor[places] for name, tensor in tensors.items() if isinstance(tensor, Tensor)})
