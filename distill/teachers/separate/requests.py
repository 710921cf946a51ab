"""What a student's rank asks: rows of a micro-batch as 32-bit words, and which teacher's rank gets which rows.

A row is its token ids; where sequences begin (packed) or how long the row is (padded) takes a word each, and the supervised
positions are runs, two words each. From these the teacher's rank builds the very batch that the student's rank has: the same
layout, targets in the same order, and so the same bits in its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.data.batch import TokenBatch

_HEAD = 5  # words before the rows: R, L, packed, segments, runs


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive rows of a batch for one teacher's rank: their targets are ``places`` of the batch's T."""

    batch: TokenBatch
    places: Tensor  # [t] int64, ascending


def deal(batch: TokenBatch, student: int, students: int, teachers: int) -> list[Part]:
    """A batch of one of ``students`` dealt to ``teachers``, one part each, some without targets.

    All students' batches laid end to end are cut into equal pieces, so that as many teachers as students get a whole batch each.
    It depends on the number of rows and on nothing that is known later.
    """
    rows = len(batch.input_ids)
    parts = []
    for teacher in range(teachers):
        edges = [-((student * teachers - edge * students) * rows // teachers) for edge in (teacher, teacher + 1)]
        begin, end = (min(max(edge, 0), rows) for edge in edges)
        parts.append(_part(batch, begin, end))
    return parts


def _part(batch: TokenBatch, begin: int, end: int) -> Part:
    if (begin, end) == (0, len(batch.input_ids)):
        return Part(batch, torch.arange(len(batch.target_ids), device=batch.target_ids.device))
    rows = batch.target_index[:, 0]
    places = torch.nonzero((rows >= begin) & (rows < end)).squeeze(1)
    index = batch.target_index[places]
    mask = batch.attention_mask
    return Part(
        TokenBatch(
            input_ids=batch.input_ids[begin:end],
            position_ids=batch.position_ids[begin:end],
            attention_mask=None if mask is None else mask[begin:end],
            target_index=torch.stack([index[:, 0] - begin, index[:, 1]], 1),
            target_ids=batch.target_ids[places],
            sequence_index=batch.sequence_index[places],
            behaviour_logprobs=batch.behaviour_logprobs[places],
            example_ids=batch.example_ids,
        ),
        places,
    )


def to_words(batch: TokenBatch) -> Tensor:
    """``[n]`` int32 on the CPU; empty for a batch without targets, of which there is nothing to say."""
    if not len(batch.target_ids):
        return torch.empty(0, dtype=torch.int32)
    ids, positions = batch.input_ids.cpu(), batch.position_ids.cpu()
    rows, width = ids.shape
    packed = batch.attention_mask is None
    if packed:
        layout = torch.nonzero(positions.reshape(-1) == 0).squeeze(1)
    else:
        assert batch.attention_mask is not None
        layout = batch.attention_mask.cpu().sum(1)
    row, column = batch.target_index.cpu().unbind(1)
    places = row * width + column
    first = torch.ones(len(places), dtype=torch.bool)
    first[1:] = places.diff() != 1
    begins = torch.nonzero(first).squeeze(1)
    lengths = torch.cat([begins, torch.tensor([len(places)])]).diff()
    head = torch.tensor([rows, width, int(packed), len(layout), len(begins)])
    return torch.cat([head, ids.reshape(-1), layout, places[begins], lengths]).int()


def from_words(words: Tensor) -> TokenBatch:
    """The batch that ``to_words`` was given, without what only its student knows (examples, behaviour log-probabilities)."""
    values = words.cpu().long()
    rows, width, packed, segments, runs = values[:_HEAD].tolist()
    sizes = [rows * width, segments, runs, runs]
    assert len(values) == _HEAD + sum(sizes), "the words of one batch"
    ids, layout, begins, lengths = values[_HEAD:].split(sizes)
    ids = ids.view(rows, width)
    columns = torch.arange(width).expand(rows, width)
    mask = None
    positions = columns
    if packed:
        counts = torch.cat([layout, torch.tensor([rows * width])]).diff()
        starts = torch.repeat_interleave(layout, counts).view(rows, width)
        positions = torch.arange(rows * width).view(rows, width) - starts
    else:
        mask = (columns < layout.unsqueeze(1)).long()
    offsets = torch.repeat_interleave(begins - torch.cat([torch.zeros(1).long(), lengths.cumsum(0)[:-1]]), lengths)
    places = torch.arange(len(offsets)) + offsets
    index = torch.stack([places // width, places % width], 1)
    return TokenBatch(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        target_index=index,
        target_ids=ids[index[:, 0], index[:, 1] + 1],
        sequence_index=torch.zeros(len(index), dtype=torch.int64),
        behaviour_logprobs=torch.full((len(index),), float("nan")),
        example_ids=[],
    )


def put_together(parts: Sequence[Part], values: Sequence[Tensor]) -> Tensor:
    """Values ``[t, …]`` of the parts' targets in the order of the batch's, ``[T, …]``."""
    filled = [(part, value) for part, value in zip(parts, values, strict=True) if len(value)]
    if len(filled) == 1:
        return filled[0][1]
    joined = torch.cat([value for _, value in filled]) if filled else values[0]
    places = torch.cat([part.places for part, _ in filled]) if filled else None
    return joined if places is None else joined[torch.argsort(places)]
