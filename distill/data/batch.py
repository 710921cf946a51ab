"""One micro-batch as tensors, padded or packed, with the supervised positions listed explicitly.

A loss needs the logits at some positions and the token that follows each: those of the response that
``TokenSequence.supervised`` does not leave out. Listing those positions makes padded and
packed batches the same to everything downstream: targets come in the order of the sequences, then of their tokens,
however the sequences are laid out. Example::

    batch = collate(sequences, tokenizer.pad_token_id, pack_length=4096).to(device)
    masks = {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask}
    logits = model(batch.input_ids, **masks, use_cache=False).logits
    rows, columns = batch.target_index.unbind(1)
    losses = cross_entropy(logits[rows, columns], batch.target_ids, reduction="none")
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from distill.data.packing import first_fit_decreasing
from distill.data.tokenize import TokenSequence


@dataclass(slots=True)
class TokenBatch:
    """R rows of L tokens holding S sequences with T supervised tokens in all.

    Attributes:
        input_ids: [R, L] int64.
        position_ids: [R, L] int64; 0, 1, 2, … within each sequence. In a packed batch the padding behind a row's last
            sequence counts as one more sequence, so that it attends to nothing else.
        attention_mask: [R, L] int64, 1 for tokens and 0 for padding; None in a packed batch (see ``packing.py``).
        target_index: [T, 2] int64, (row, column) of the position whose logits predict a supervised token.
        target_ids: [T] int64, that token.
        sequence_index: [T] int64, which of the sequences it belongs to (their order is that of ``collate``'s argument).
        behaviour_logprobs: [T] fp32, the token's log-probability when a model wrote it; NaN in text from elsewhere.
        example_ids: the S ids.
        sequences: the S sequences themselves, for whoever reads more of them than their tokens (tags, prompts as text); empty
            in a batch that came from another process.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    target_index: Tensor
    target_ids: Tensor
    sequence_index: Tensor
    behaviour_logprobs: Tensor
    example_ids: list[str]
    sequences: Sequence[TokenSequence] = ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TokenBatch":
        """The same batch with its tensors on ``device``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return TokenBatch(
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            attention_mask=None if self.attention_mask is None else move(self.attention_mask),
            target_index=move(self.target_index),
            target_ids=move(self.target_ids),
            sequence_index=move(self.sequence_index),
            behaviour_logprobs=move(self.behaviour_logprobs),
            example_ids=self.example_ids,
            sequences=self.sequences,
        )


def collate(sequences: Sequence[TokenSequence], pad_id: int, pack_length: int | None) -> TokenBatch:
    """Lay sequences out as one micro-batch.

    Args:
        pad_id: fills what is left of a row; never attended to and never a target.
        pack_length: None gives one sequence per row, padded on the right; otherwise sequences share rows of at most
            this many tokens. Rows are as long as the fullest one.

    No sequences (a rank whose samples were all skipped) give one row with one padding token and no targets, so that
    the rank can still take part in the collectives of a step. The first token of a sequence without a prompt has no
    predecessor and is no target.
    Raises ValueError for a sequence that is empty or longer than ``pack_length``.
    """
    _check(sequences, pack_length)
    lengths = [len(sequence.ids) for sequence in sequences]
    rows = [[i] for i in range(len(lengths))] if pack_length is None else first_fit_decreasing(lengths, pack_length)
    rows = rows or [[]]
    width = max(1, max(sum(lengths[i] for i in row) for row in rows))
    starts = _starts(rows, lengths)
    chosen = [supervised_places(sequence) for sequence in sequences]
    targets = torch.cat([_NO_TARGETS, *(_targets(start, positions) for start, positions in zip(starts, chosen))])
    counts = torch.tensor([len(positions) for positions in chosen], dtype=torch.int64)
    logprobs = [_logprobs(sequence, positions) for sequence, positions in zip(sequences, chosen)]
    input_ids = torch.stack([_row_ids([sequences[i].ids for i in row], width, pad_id) for row in rows])
    return TokenBatch(
        input_ids=input_ids,
        position_ids=torch.stack([_row_positions([lengths[i] for i in row], width, pack_length) for row in rows]),
        attention_mask=_padding_mask(lengths, width) if pack_length is None else None,
        target_index=targets,
        target_ids=input_ids[targets[:, 0], targets[:, 1] + 1],
        sequence_index=torch.repeat_interleave(torch.arange(len(counts)), counts),
        behaviour_logprobs=torch.cat([torch.empty(0), *logprobs]),
        example_ids=[sequence.example_id for sequence in sequences],
        sequences=tuple(sequences),
    )


_NO_TARGETS = torch.empty(0, 2, dtype=torch.int64)


def _check(sequences: Sequence[TokenSequence], pack_length: int | None) -> None:
    for sequence in sequences:
        length = len(sequence.ids)
        if length == 0:
            raise ValueError(f"example {sequence.example_id} has no tokens")
        if pack_length is not None and length > pack_length:
            raise ValueError(
                f"example {sequence.example_id} has {length} tokens and does not fit into rows of {pack_length}"
            )


def _starts(rows: list[list[int]], lengths: list[int]) -> list[tuple[int, int]]:
    """(row, column) of the first token of each sequence, in the order of the sequences."""
    starts = [(0, 0)] * len(lengths)
    for number, row in enumerate(rows):
        for i, column in zip(row, accumulate((lengths[i] for i in row), initial=0)):
            starts[i] = (number, column)
    return starts


def _row_ids(parts: list[list[int]], width: int, pad_id: int) -> Tensor:
    ids = [token for part in parts for token in part]
    return torch.tensor(ids + [pad_id] * (width - len(ids)), dtype=torch.int64)


def _row_positions(lengths: list[int], width: int, pack_length: int | None) -> Tensor:
    """Positions restart with each sequence and, where packed, with the padding; padded rows just count on."""
    if pack_length is None:
        return torch.arange(width)
    return torch.cat([torch.arange(length) for length in (*lengths, width - sum(lengths))])


def _padding_mask(lengths: list[int], width: int) -> Tensor:
    """[R, L] int64, 1 on the first ``lengths[r]`` columns; an empty batch attends to its padding (no NaN)."""
    return (torch.arange(width) < torch.tensor(lengths or [1])[:, None]).long()


def supervised_places(sequence: TokenSequence) -> Tensor:
    """[t]: places in ``sequence.ids`` of the supervised tokens; targets of a batch come in their order."""
    first = max(sequence.prompt_length, 1)
    places = torch.arange(first, len(sequence.ids))
    if sequence.supervised is None:
        return places
    return places[torch.tensor(sequence.supervised[first - sequence.prompt_length :], dtype=torch.bool)]


def _targets(start: tuple[int, int], places: Tensor) -> Tensor:
    """[t, 2]: the position before each supervised token, whose logits predict it."""
    row, column = start
    return torch.stack([torch.full_like(places, row), places + (column - 1)], dim=1)


def _logprobs(sequence: TokenSequence, places: Tensor) -> Tensor:
    """[t] fp32: behaviour log-probabilities at these places."""
    if sequence.logprobs is None:
        return torch.full((len(places),), float("nan"))
    return torch.tensor(sequence.logprobs, dtype=torch.float32)[places - sequence.prompt_length]
