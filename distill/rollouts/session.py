"""Rows of tokens over one model: open, append, score, decode, rewind, close.

This is the level below `Generator`, for methods that steer a trajectory while it grows (MOTAB: decode a step with the
student, score it with the teacher, rewind, continue). A row is a token list plus however much of it the key-value
cache already holds. All calls are lazy about the cache: tokens are fed when logits are asked for, and never twice,
except the last one of a row, whose logits are the start of whatever comes next. Rewinding is therefore free.

    session = Session(model, slots=8)
    rows = session.open(prompts)                 # nothing computed yet
    logits = session.next_logits(rows)           # [8, V]; prefills all prompts in one ragged batch
    session.append(rows, chosen_tokens)
    scores = session.score(rows, new_tokens)     # appends, returns logits for each new token and for the one after
    session.rewind(rows[0], 12); session.close(rows[1:])

A session sees the weights as they were when it was made: make a new one after every optimizer step.
Nothing here records gradients; logits are ordinary tensors that may enter a loss as constants.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.rollouts.cache import Chunk, Ints, KVCache
from distill.rollouts.forward import build_forward, context_length, model_device, unwrap
from distill.rollouts.lean import LeanForward

_PREFILL_TOKENS = 8192
"""Padded tokens per prefill call: bounds activations and the [rows, width, extent] mask."""
_RAGGED_TOKENS = 512
"""Padded tokens up to which rows of any length share a call; beyond, attention over padding costs more than another call."""


class Session:
    """Up to ``slots`` rows of at most ``context`` tokens over one model (in eval mode, or dropout would apply).

    ``context_length`` defaults to the model's ``max_position_embeddings``. ``lean=False`` keeps to the Hugging Face
    forward. Raises `UnsupportedModelError` for a model that needs more than a full-attention cache, ``ValueError`` for a
    context beyond the model's.
    """

    def __init__(
        self, model: PreTrainedModel, *, slots: int, context_length: int | None = None, lean: bool = True
    ) -> None:
        if slots < 1:
            raise ValueError(f"a session needs at least one slot, not {slots}")
        model = unwrap(model)
        self.slots, self.context = slots, resolve_context(model, context_length)
        self.device = model_device(model)
        with torch.no_grad():
            self._forward = build_forward(model, lean=lean)
        self.lean = isinstance(self._forward, LeanForward)
        config = model.config.get_text_config(decoder=True)
        self.cache = KVCache(config.num_hidden_layers, slots, self.context)
        self._tokens: Ints = np.zeros((slots, 0), dtype=np.int64)
        self._length: Ints = np.full(slots, -1, dtype=np.int64)  # -1: closed
        self._place: Ints = np.full(slots, -1, dtype=np.int64)  # row → place in the cache
        self._owner: Ints = np.full(slots, -1, dtype=np.int64)  # place → row

    # ------------------------------------------------------------------ rows

    @property
    def free(self) -> int:
        """Rows that can still be opened."""
        return int((self._length < 0).sum())

    def open(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """New rows holding these tokens; nothing is computed.

        Raises ``ValueError``, and opens nothing, when too few slots are free or a prompt exceeds the context.
        """
        if len(prompts) > self.free:
            raise ValueError(f"cannot open {len(prompts)} rows: {self.free} of {self.slots} slots are free")
        self._reserve(max(map(len, prompts), default=0), "a new row")
        rows = np.flatnonzero(self._length < 0)[: len(prompts)]
        places = np.flatnonzero(self._owner < 0)[: len(prompts)]
        self._place[rows], self._owner[places] = places, rows
        self._length[rows] = 0
        self.cache.lengths[places] = 0
        opened = rows.tolist()
        self.append(opened, prompts)
        return opened

    def close(self, rows: Sequence[int]) -> None:
        """Give the rows' slots back."""
        for row in self._checked(rows):
            self._owner[self._place[row]] = self._place[row] = self._length[row] = -1

    def length(self, row: int) -> int:
        """Tokens in a row."""
        if not 0 <= row < self.slots or self._length[row] < 0:
            raise ValueError(f"row {row} is not open in this session")
        return int(self._length[row])

    def lengths(self, rows: Ints) -> Ints:
        """`length` of several rows, unchecked: -1 for a closed one."""
        return self._length[rows]

    def tokens(self, row: int, start: int = 0) -> list[int]:
        """The row's tokens from ``start`` on, prompt included."""
        return self._tokens[row, start : self.length(row)].tolist()

    def append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Add given tokens to the ends of the rows; they are fed to the model when logits are next needed.

        Raises ``ValueError``, and appends nothing, when a row would exceed the context.
        """
        chosen = self._checked(rows)
        for row, new in zip(chosen, tokens, strict=True):
            self._reserve(int(self._length[row]) + len(new), f"row {row}")
        for row, new in zip(chosen, tokens):
            start = self._length[row]
            self._tokens[row, start : start + len(new)] = new
            self._length[row] = start + len(new)

    def rewind(self, row: int, length: int) -> None:
        """Cut a row back to its first ``length`` tokens. The prefix stays in the cache and is not computed again."""
        held = self.length(row)
        if not 0 <= length <= held:
            raise ValueError(f"cannot rewind row {row} to {length} tokens: it holds {held}")
        self._length[row] = length
        place = int(self._place[row])
        self.cache.rewind(place, min(length, int(self.cache.lengths[place])))

    def fork(self, row: int, copies: int) -> list[int]:
        """``copies`` new rows with this row's tokens and the part of them that is already in the cache."""
        made = self.open([self.tokens(row)] * copies)
        for copy in made:
            self.cache.move(int(self._place[row]), int(self._place[copy]))
        return made

    # ---------------------------------------------------------------- logits

    @torch.no_grad()
    def prefill(self, rows: Sequence[int]) -> None:
        """Bring everything but each row's last token into the cache (the last one is fed by the next decode step)."""
        chosen = self._checked(rows)
        for part, tokens in self._pieces(chosen, self._length[chosen] - 1):
            self._feed(part, tokens, logits=False)

    @torch.no_grad()
    def next_logits(self, rows: Sequence[int]) -> Tensor:
        """Logits [len(rows), V] (model's dtype) for the token after each row's last one; rows must not be empty."""
        chosen = self._checked(rows)
        self.prefill(rows)
        order = self.arrange(chosen)
        logits = self.step(order)
        back = np.empty(self.slots, dtype=np.int64)
        back[order] = np.arange(len(order))
        return logits[torch.from_numpy(back[chosen]).to(logits.device)]

    @torch.no_grad()
    def score(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """Append ``tokens[i]`` to ``rows[i]`` in one batched prefill and return the logits that judge them.

        For a row that held tokens before, [len(tokens[i]) + 1, V]: entry ``j`` is the distribution of ``tokens[i][j]``
        given all before it, the last entry that of whatever follows. For an empty row the first token has no
        distribution, so there are len(tokens[i]) entries. Model's dtype. All logits are held at once (V numbers per new
        token): with a large vocabulary, score fewer rows per call.
        """
        chosen = self._checked(rows)
        # The last old token predicts the first new one: it is fed again unless its logits are still due anyway.
        for place, start in zip(self._place[chosen], self._length[chosen] - 1):
            self.cache.rewind(int(place), int(min(self.cache.lengths[place], max(start, 0))))
        due = np.maximum(self._length[chosen] - 1, 0)
        for part, old in self._pieces(chosen, due):
            self._feed(part, old, logits=False)
        self.append(rows, tokens)
        parts: dict[int, list[Tensor]] = {int(row): [] for row in chosen}
        for part, new in self._pieces(chosen, self._length[chosen]):
            logits = self._feed(part, new, logits=True)
            assert logits is not None
            for row, piece in zip(part, logits.split([len(one) for one in new])):
                parts[int(row)].append(piece)
        return [torch.cat(parts[int(row)]) for row in chosen]

    def arrange(self, rows: Ints) -> Ints:
        """Bring these rows to the front of the cache; returns them in the order of their places 0, 1, ….

        Only rows that lie outside the front are copied, once each, so a shrinking batch stays contiguous cheaply.
        """
        count = len(rows)
        wanted = np.zeros(self.slots, dtype=bool)
        wanted[rows] = True
        front = self._owner[:count]
        holes = [place for place in range(count) if front[place] < 0 or not wanted[front[place]]]
        if holes:
            self._bring(rows[self._place[rows] >= count], np.array(holes))
        return self._owner[:count].copy()

    def _bring(self, rows: Ints, holes: Ints) -> None:
        """Give these rows the places ``holes``; rows that are there get theirs in exchange."""
        sources, others = self._place[rows], self._owner[holes]
        taken = others >= 0
        if not taken.all():
            self.cache.move(sources[~taken], holes[~taken])
        if taken.any():
            self.cache.swap(sources[taken], holes[taken])
            self._place[others[taken]] = sources[taken]
        self._owner[sources], self._owner[holes], self._place[rows] = others, rows, holes

    def arranged(self, order: Ints) -> bool:
        """Whether these rows are at places 0, 1, … in this order."""
        return bool((self._owner[: len(order)] == order).all())

    @torch.no_grad()
    def step(self, order: Ints) -> Tensor:
        """One decode step: feed the last token of every row; logits [n, V] in the order given.

        ``order`` must come from `arrange`, and the rows must be prefilled. `next_logits` does both.
        """
        places = np.arange(len(order))
        last = self._length[order] - 1
        if not self.arranged(order):
            raise ValueError(f"rows {order.tolist()} are not at the front of the cache; call arrange before a step")
        if (last < 0).any() or (self.cache.lengths[places] < last).any():
            raise ValueError(f"rows {order.tolist()} must hold tokens and be prefilled before a step")
        self.cache.lengths[places] = last
        chunk = self.cache.single(places, self._tokens[order, last], self.device)
        logits = self._forward(chunk, self.cache, logits=True)
        self.cache.lengths[places] += 1
        assert logits is not None
        return logits

    def push(self, order: Ints, tokens: Ints) -> None:
        """Append one token to each row, for the decode loop: as `append`, without per-row Python work."""
        where = self._length[order]
        self._reserve(int(where.max()) + 1, f"row {order[where.argmax()]}")
        self._tokens[order, where] = tokens
        self._length[order] = where + 1

    # --------------------------------------------------------------- private

    def _checked(self, rows: Sequence[int] | Ints) -> Ints:
        chosen = np.asarray(rows, dtype=np.int64)
        if ((chosen < 0) | (chosen >= self.slots)).any() or (self._length[chosen] < 0).any():
            raise ValueError(f"not all of the rows {chosen.tolist()} are open in this session")
        if len(np.unique(chosen)) != len(chosen):
            raise ValueError(f"a row occurs twice in {chosen.tolist()}")
        return chosen

    def _reserve(self, length: int, what: str) -> None:
        if length > self.context:
            raise ValueError(f"{what} would hold {length} tokens, but the context is {self.context}")
        held = self._tokens.shape[1]
        if length > held:
            wider = np.zeros((self.slots, min(self.context, max(length, 2 * held, 128))), dtype=np.int64)
            wider[:, :held] = self._tokens
            self._tokens = wider

    def _feed(self, rows: Ints, tokens: list[Ints], *, logits: bool) -> Tensor | None:
        places = self._place[rows]
        chunk: Chunk = self.cache.chunk(places, tokens, self.device)
        out = self._forward(chunk, self.cache, logits=logits)
        self.cache.lengths[places] += [len(new) for new in tokens]
        return out

    def _pieces(self, rows: Ints, until: Ints) -> Iterator[tuple[Ints, list[Ints]]]:
        """Batches of (rows, tokens) that bring each row's cache up to ``until`` tokens, of similar lengths each.

        Long rows come in several pieces, in order. Rows without a past come apart from the others, as their
        attention needs no cache.
        """
        held = self.cache.lengths[self._place[rows]]
        todo = sorted(
            (int(start > 0), int(end - start), int(start), int(row))
            for row, start, end in zip(rows, held, until)
            if end > start
        )
        while todo:
            past, count, start, row = todo.pop()
            width = min(count, _PREFILL_TOKENS)
            batch = [(row, start, width)]
            if count > width:
                todo.append((1, count - width, start + width, row))
            else:
                while todo and todo[-1][0] == past and (len(batch) + 1) * width <= _most(width, todo[-1][1]):
                    _, count, start, row = todo.pop()
                    batch.append((row, start, count))
            batch.sort(key=lambda item: self._place[item[0]])
            yield np.array([item[0] for item in batch]), [self._tokens[r, s : s + c] for r, s, c in batch]


def _most(width: int, count: int) -> int:
    """Padded tokens that a call of rows of ``width`` may have with a row of ``count`` tokens in it."""
    return _PREFILL_TOKENS if 2 * count >= width else _RAGGED_TOKENS


def resolve_context(model: PreTrainedModel, wanted: int | None) -> int:
    """The context to use, in tokens; raises ``ValueError`` when the model cannot have it."""
    limit = context_length(model)
    if wanted is None and limit is None:
        raise ValueError(f"{type(model).__name__} names no max_position_embeddings: pass context_length")
    if wanted is not None and (wanted < 1 or (limit is not None and wanted > limit)):
        raise ValueError(f"context_length {wanted} is outside 1..{limit}, the model's max_position_embeddings")
    return wanted or limit or 0
