"""A teacher with a tokenizer of its own: it reads the student's text in its own tokens, and what it says is brought back to the
student's (``alignment``).

The teacher sees its own tokens of its own prompt (its chat template, its special tokens) and of the response.

    sampled   A group's log-probability is the sum over the teacher's tokens of the group, given to the group's student tokens
              in proportion to their own log-probabilities when the student wrote them: where student and teacher give a group
              the same probability no token is pushed, else all of them the same way. Text whose log-probabilities are not
              known is shared by bytes. Either way the sum over a text is the teacher's log-probability of the text (of these
              tokens of it: other ways to spell it are left out, so it is a lower bound).
    topk      At a position where both sides have read the same bytes, the teacher's tokens that are spelled as a token of the
              student's become that token; the rest of its mass goes to "anything else". "Its next token is x" is not the same event
              on both sides where one has a token for a longer text that starts with x: an approximation, as all peers make.

Positions without a counterpart add no loss, and they count in means over tokens. ``teacher/align_share`` is the share of the
response's bytes in groups (sampled), or of the teacher's listed mass that has found a token, over all positions (topk). Below
``teacher.align.min_share`` over the run so far the run is refused, before its first step where texts alone show it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.data.batch import TokenBatch, collate, supervised_places
from distill.data.example import Example
from distill.data.tokenize import TokenSequence, TooLong, encode_prompt
from distill.distributed import gathered, total
from distill.errors import DataError
from distill.teachers.alignment import NONE, Alignment, align
from distill.teachers.base import Scorer
from distill.teachers.mixture import merged
from distill.teachers.signals import SampledToken, Signal, TopK
from distill.teachers.spelling import Spelling


class Aligner:
    """Student's and teacher's tokenizers side by side; ``name`` is the teacher's, for messages."""

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        name: str = "the teacher",
        context: int | None = None,
    ) -> None:
        self.name, self.tokenizer, self.context = name, teacher, context
        self._writer = student
        self.student, self.teacher = Spelling(student, "the student"), Spelling(teacher, name)
        self._same: dict[tuple[bool, bool], Tensor] = {}

    def align(self, ids: Sequence[int]) -> Alignment:
        """Of a response's ids."""
        return align(self.student, ids, self.teacher, self._encode)

    def _encode(self, text: str) -> list[int]:
        # A student may write what looks like a special token: it is text.
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(encoded["input_ids"])

    def read(self, sequence: TokenSequence, alignment: Alignment) -> TokenSequence:
        """What the teacher reads. Raises TooLong where that is more than it can."""
        assert sequence.prompt is not None
        example = Example(sequence.example_id, sequence.prompt, None, None)
        prompt = encode_prompt(self.tokenizer, example)
        ids = [*prompt, *alignment.teacher_ids]
        if self.context is not None and len(ids) > self.context:
            remedy = "lower rollout.max_new_tokens and train.max_length, or set data.on_long=skip"
            raise TooLong(sequence.example_id, f"{self.name}'s tokenizer makes", len(ids), self.context, remedy)
        return TokenSequence(ids, len(prompt), sequence.example_id, sample=sequence.sample, tag=sequence.tag)

    def same_token(self, ours_leads: bool = False, theirs_leads: bool = False) -> Tensor:
        """``[V_t]`` int64: the student's id that is spelled as each of the teacher's, −1: none.

        At the start of a text, a side that puts a space in front of every text means none by it (``…_leads``).
        """
        key = (ours_leads, theirs_leads)
        if key not in self._same:
            ours: dict[bytes, int] = {}
            for number in reversed(range(len(self.student))):  # the first of several with one spelling
                if piece := self.student[number]:
                    ours[piece] = number
            if ours_leads:
                spaced = {piece[1:]: number for piece, number in ours.items() if piece[:1] == b" "}
                ours = {piece: number for piece, number in ours.items() if piece[:1] != b" "} | spaced
            pieces = [self.teacher[number] or b"" for number in range(len(self.teacher))]
            spelled = [piece.removeprefix(b" ") if theirs_leads else piece for piece in pieces]
            found = [ours.get(piece, -1) if piece else -1 for piece in spelled]
            if isinstance(self.student.end, int) and isinstance(self.teacher.end, int):
                found[self.teacher.end] = self.student.end
            self._same[key] = torch.tensor(found)
        return self._same[key]

    def example(self, sequence: TokenSequence, alignment: Alignment) -> str | None:
        """The first place of a response without a counterpart, for a person; None where there is none."""
        ids = sequence.response_ids
        place = next((i for i, group in enumerate(alignment.student) if group == NONE), None)
        if place is None:
            return None
        ours = self._writer.convert_ids_to_tokens(ids[max(place - 2, 0) : place + 3])
        theirs = self.tokenizer.convert_ids_to_tokens(alignment.teacher_ids[:8])
        return f"{sequence.example_id}: {ours} of the student, {theirs} … of the teacher"


@dataclass(frozen=True, slots=True)
class _Reading:
    """A micro-batch as the teacher reads it (T' positions) and what leads back to the student's T."""

    batch: TokenBatch
    ours: Tensor  # [T]: group of each position's token; 0: none
    theirs: Tensor  # [T']: the same
    shares: Tensor  # [T] fp64: of its group's log-probability
    heads: Tensor  # [T]: the teacher's position that has read the same bytes, NONE where there is none
    tables: Tensor  # [T]: of ``tokens``
    tokens: Tensor  # [tables, V_t]: ``Aligner.same_token``
    aligned_bytes: float
    bytes: float


class Aligned:
    """A ``Scorer`` around one that reads the teacher's tokens. Its own signal is the inner one's kind: sampled or topk."""

    def __init__(self, inner: Scorer, aligner: Aligner, min_share: float) -> None:
        self.inner, self.aligner, self.min_share = inner, aligner, min_share
        self.ahead, self.may_be_lost = inner.ahead, inner.may_be_lost
        self._waiting: deque[tuple[TokenBatch, _Reading]] = deque()
        self._step = [0.0, 0.0]  # since the last figures: what is aligned, and all of it (bytes, or mass)
        self._run = [0.0, 0.0]  # the same of all ranks and steps
        self._examples: list[str] = []

    def submit(self, batches: Sequence[TokenBatch]) -> None:
        readings = [self._read(batch) for batch in batches]
        self._waiting.extend(zip(batches, readings, strict=True))
        self.inner.submit([reading.batch for reading in readings])

    def take(self, batch: TokenBatch) -> Signal:
        oldest, reading = self._waiting.popleft()
        assert oldest is batch, "signals are taken in the order in which they were asked for"
        signal = self.inner.take(reading.batch)
        if isinstance(signal, SampledToken):
            self._count(reading.aligned_bytes, reading.bytes)
            return in_students_tokens(reading, signal)
        assert isinstance(signal, TopK), "whole distributions over other tokens have no meaning for the student"
        ours, mass = in_students_lists(reading, signal)
        self._count(mass, float(len(batch.target_ids)))
        return ours

    def figures(self) -> dict[str, float]:
        """Raises DataError on every rank where too little is aligned. All ranks call it together."""
        mine, self._step = self._step, [0.0, 0.0]
        step = total(mine)
        self._run = [before + now for before, now in zip(self._run, step, strict=True)]
        examples = [text for part in gathered(self._examples) for text in part]
        check_share(self.aligner.name, self._run, self.min_share, examples)
        return {**self.inner.figures(), "align_share": mine[0], "align_share#": mine[1]}

    def recover(self) -> bool:
        return self.inner.recover()

    def cancel(self) -> None:
        self._waiting.clear()
        self.inner.cancel()

    def close(self) -> None:
        self.inner.close()

    def _count(self, aligned: float, everything: float) -> None:
        self._step = [self._step[0] + aligned, self._step[1] + everything]

    def _read(self, batch: TokenBatch) -> _Reading:
        """The same responses in the teacher's tokens, behind its own prompts."""
        assert len(batch.sequences) == len(batch.example_ids), "a batch of this process"
        joined = _Joined()
        for sequence in batch.sequences:
            alignment = self.aligner.align(sequence.response_ids)
            joined.add(sequence, self.aligner.read(sequence, alignment), alignment, self.aligner)
            if len(self._examples) < 2 and (example := self.aligner.example(sequence, alignment)):
                self._examples.append(example)
        packed = batch.attention_mask is None
        return joined.reading(self.aligner, packed, batch.input_ids.device)


class _Joined:
    """Sequences of a micro-batch end to end, as ``collate`` lists their targets."""

    def __init__(self) -> None:
        self._sequences: list[TokenSequence] = []
        self._columns: list[tuple[Tensor, ...]] = []
        self._theirs: list[Tensor] = []
        self._groups, self._positions = 0, 0
        self._bytes = [0.0, 0.0]

    def add(self, ours: TokenSequence, theirs: TokenSequence, alignment: Alignment, aligner: Aligner) -> None:
        places = supervised_places(ours) - ours.prompt_length
        groups = torch.tensor(alignment.student, dtype=torch.int64)
        heads = torch.tensor(_heads(alignment), dtype=torch.int64)
        starts = torch.zeros(len(groups), dtype=torch.int64)
        if len(starts):
            starts[0] = 1 + int(alignment.shifted or aligner.teacher.lead)
        sizes = torch.tensor(alignment.sizes, dtype=torch.float64)[places]
        self._bytes[0] += float(sizes[groups[places] != NONE].sum())
        self._bytes[1] += float(sizes.sum())
        self._columns.append(
            (
                torch.where(groups == NONE, 0, groups + 1 + self._groups)[places],
                group_shares(alignment, ours.logprobs)[places],
                torch.where(heads == NONE, NONE, heads + self._positions)[places],
                starts[places],
            )
        )
        others = torch.tensor(alignment.teacher, dtype=torch.int64)
        self._theirs.append(torch.where(others == NONE, 0, others + 1 + self._groups))
        self._sequences.append(theirs)
        self._groups += max((*alignment.student, *alignment.teacher), default=NONE) + 1
        self._positions += len(others)

    def reading(self, aligner: Aligner, packed: bool, device: torch.device) -> _Reading:
        longest = max((len(sequence.ids) for sequence in self._sequences), default=1)
        pad = aligner.tokenizer.pad_token_id
        batch = collate(self._sequences, pad if isinstance(pad, int) else 0, longest if packed else None)
        empty = torch.empty(0, dtype=torch.int64)
        columns = [torch.cat(parts) for parts in zip(*self._columns)] or [empty, empty.double(), empty, empty]
        ours, shares, heads, tables = (column.to(device) for column in columns)
        lead = aligner.student.lead
        tokens = torch.stack([aligner.same_token(), aligner.same_token(lead), aligner.same_token(lead, True)])
        theirs = torch.cat([empty, *self._theirs]).to(device)
        return _Reading(batch.to(device), ours, theirs, shares, heads, tables, tokens.to(device), *self._bytes)


def group_shares(alignment: Alignment, logprobs: Sequence[float] | None) -> Tensor:
    """``[m]`` fp64: what each token gets of its group's log-probability; a group's shares add up to 1.

    ``logprobs [m]``: of the tokens when the student wrote them; None: shared by bytes.
    """
    groups = torch.tensor(alignment.student, dtype=torch.int64) + 1  # those without a group are one more
    weights = torch.tensor(alignment.sizes, dtype=torch.float64)
    if logprobs is not None:
        weights = -torch.tensor(logprobs, dtype=torch.float64).clamp_max(
            -1e-9
        )  # next to nothing to a token that was certain
    weights = weights.clamp_min(1e-9)  # a token may have no bytes, where the tokenizer's own space was left out
    sums = torch.zeros(int(groups.max()) + 1 if len(groups) else 0, dtype=torch.float64).index_add_(0, groups, weights)
    return weights / sums[groups]


def _heads(alignment: Alignment) -> list[int]:
    """``[m]``: for the first token of a group the teacher's first token of it, NONE for all others."""
    first = {group: place for place, group in reversed(list(enumerate(alignment.teacher)))}
    heads, seen = [], NONE
    for group in alignment.student:
        heads.append(first[group] if group > seen else NONE)
        seen = max(seen, group)
    return heads


def in_students_tokens(reading: _Reading, signal: SampledToken) -> SampledToken:
    """The log-probabilities of groups, shared out among the student's tokens."""
    size = int(max(reading.ours.max(), reading.theirs.max())) + 1 if len(reading.ours) and len(reading.theirs) else 1
    sums = torch.zeros(size, dtype=torch.float64, device=reading.ours.device)
    sums.index_add_(0, reading.theirs, signal.logprobs.double())
    known = reading.ours > 0
    return SampledToken(torch.where(known, sums[reading.ours * known] * reading.shares, 0.0).float(), known)


def in_students_lists(reading: _Reading, signal: TopK) -> tuple[TopK, float]:
    """The lists of the teacher's positions that have read the same bytes, in the student's ids; and the share of their listed
    mass that has found one, summed over all T positions."""
    known = reading.heads != NONE
    at = reading.heads.clamp_min(0)
    if not len(signal.ids) or not len(at):
        width = signal.ids.shape[1]
        return TopK(at.new_full((len(at), width), -1), signal.logprobs.new_full((len(at), width), -torch.inf)), 0.0
    theirs, logprobs = signal.ids[at], signal.logprobs[at]
    listed = (theirs >= 0) & known.unsqueeze(1)
    inside = listed & (theirs < reading.tokens.shape[1])
    ids = torch.where(inside, reading.tokens[reading.tables.unsqueeze(1), theirs * inside], -1)
    mass = logprobs.double().exp()
    share = (mass * (ids >= 0)).sum(-1) / (mass * listed).sum(-1).clamp_min(1e-300)
    return merged(ids, logprobs.masked_fill(ids < 0, -torch.inf)), float(share.sum())


def check_share(name: str, found: Sequence[float], least: float, examples: Sequence[str]) -> None:
    """Raises DataError, which every rank is to raise, where ``found`` = (aligned, all) is less than the share ``least``."""
    aligned, everything = found
    if not everything or aligned >= least * everything:
        return
    shown = "; ".join(examples[:2])
    error = DataError(
        f"only {aligned / everything:.1%} of what {name} says can be brought to the student's tokens, and "
        f"teacher.align.min_share={least:g}{f'. For example {shown}' if shown else ''}. Choose a teacher whose tokenizer leaves "
        "texts as they are and knows their characters; with teacher.signal=topk, try teacher.signal=sampled; or lower "
        "teacher.align.min_share"
    )
    error.on_every_rank = True
    raise error


def check_texts(aligner: Aligner, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], least: float) -> None:
    """The same of texts that a student may write, before it writes any."""
    found, examples = [0.0, 0.0], []
    for text in texts:
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        alignment = aligner.align(ids)
        found = [found[0] + alignment.aligned_bytes, found[1] + sum(alignment.sizes)]
        example = aligner.example(TokenSequence(ids, 0, f"{text[:30]!r}"), alignment)
        examples += [example] if example else []
    check_share(aligner.name, found, least, examples)
