"""Decoding many rows of a session until each ends: the loop shared by `Generator` and by step-wise methods.

Rows join with `Flight.add` at any time; every `step` decodes one token for all rows in flight and hands back those
that ended. They stay open in the session, so the caller may rewind, append, score or close them, and let them join again
(a step delimiter is simply a stop string).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from distill.rollouts.cache import Ints
from distill.rollouts.rollout import Finish
from distill.rollouts.sampling import SamplingParams, draw, seed_keys, uniforms
from distill.rollouts.session import Session
from distill.rollouts.stops import StopMatcher


@dataclass(frozen=True, slots=True)
class Segment:
    """What one row gained in one flight; the fields are those of `Rollout`."""

    row: int
    ids: list[int]
    logprobs: list[float]
    finish: Finish
    stop_string: str | None


class Flight:
    """Rows decoded together under the same sampling parameters.

    ``eos`` are the ids that end a row. ``matcher`` must be given when ``params.stop`` is not empty.
    """

    def __init__(
        self, session: Session, params: SamplingParams, eos: Sequence[int], matcher: StopMatcher | None = None
    ) -> None:
        if params.stop and (matcher is None or matcher.stop != params.stop):
            raise ValueError(f"stop strings {params.stop} need a StopMatcher made for them")
        self._session, self._params = session, params
        self._matcher = matcher if params.stop else None
        self._eos = np.array(sorted(eos), dtype=np.int64)
        self._is_eos: NDArray[np.bool_] | None = None
        self._order: Ints = np.zeros(0, dtype=np.int64)
        self._begin, self._end = (np.zeros(session.slots, dtype=np.int64) for _ in range(2))
        self._keys = np.zeros(session.slots, dtype=np.uint64)
        self._logprobs = np.zeros((session.slots, 0), dtype=np.float32)

    def __len__(self) -> int:
        """Rows in flight."""
        return len(self._order)

    def add(
        self,
        rows: Sequence[int],
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        written: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Let open rows join, each with its seed; a row gets ``max_new_tokens`` or what the context leaves.

        ``limits`` (at least 1 each) replaces ``max_new_tokens`` row by row. ``written[i]`` says that the last tokens of row ``i``
        are the beginning of its response, with these log-probabilities: limits, stop strings and the row's segment count
        from there, as if it had never left. Raises ``ValueError`` for a row that is empty or already fills the context.
        """
        chosen = np.asarray(rows, dtype=np.int64)
        most = self._params.max_new_tokens if limits is None else np.asarray(limits, dtype=np.int64)
        lengths, context = self._session.lengths(chosen), self._session.context
        for row, length in zip(rows, lengths):
            if not 1 <= length < context:
                raise ValueError(f"row {row} holds {length} tokens; decoding needs 1 to {context - 1}")
        self._keys[chosen] = seed_keys(seeds)
        begin = lengths if written is None else lengths - [len(one) for one in written]
        self._begin[chosen] = begin
        self._end[chosen] = np.minimum(begin + most, context)
        for row, start, one in zip(rows, begin, written or ()):
            self._hold(int(start) + len(one))
            self._logprobs[row, start : start + len(one)] = one
        self._session.prefill(rows)
        self._order = np.concatenate([self._order, chosen])

    def step(self) -> list[Segment]:
        """One token for every row in flight; returns the rows that ended, which leave the flight."""
        if not len(self._order):
            return []
        # Only now, not when a row left: by now its owner may have closed it, and a closed row need not be swapped out.
        # Other work on the session, another flight say, may have moved rows as well.
        if not self._session.arranged(self._order):
            self._order = self._session.arrange(self._order)
        order = self._order
        position = self._session.lengths(order)
        tokens, logprobs = self._draw(order, position)
        self._session.push(order, tokens)
        self._record(order, position, logprobs)
        finishes = self._finishes(order, tokens, position + 1)
        if not finishes:
            return []
        self._order = np.array([row for row in order.tolist() if row not in finishes], dtype=np.int64)
        return [self._segment(row, *why) for row, why in finishes.items()]

    def land(self) -> list[tuple[int, list[int], list[float]]]:
        """(row, ids, log-probabilities) of every row in flight, none of which has ended; they leave the flight and stay open."""
        rows, self._order = self._order.tolist(), self._order[:0]
        return [(row, *self._gained(row)) for row in rows]

    def _draw(self, order: Ints, position: Ints) -> tuple[Ints, NDArray[np.float32]]:
        # Inference mode saves a few percent over no_grad. Not for Hugging Face forwards: a model may keep a table it
        # makes on the way, and tensors from inference mode would break its training later.
        with torch.inference_mode(self._session.lean):
            logits = self._session.step(order)
            uniform = None
            if self._params.temperature > 0.0:
                uniform = torch.from_numpy(uniforms(self._keys[order], position)).to(logits.device)
            tokens, logprobs = draw(logits, self._params, uniform)
        values = logprobs.cpu().numpy()
        if not np.isfinite(values).all():
            row = int(order[np.argmin(np.isfinite(values))])
            raise FloatingPointError(
                f"the model's logits for row {row} at position {self._session.length(row)} are not finite; "
                "its weights or inputs hold NaN or infinity"
            )
        if self._is_eos is None:
            self._is_eos = np.isin(np.arange(logits.shape[-1]), self._eos)
        return tokens.cpu().numpy(), values

    def _record(self, order: Ints, position: Ints, logprobs: NDArray[np.float32]) -> None:
        self._hold(int(position.max()) + 1)
        self._logprobs[order, position] = logprobs

    def _hold(self, needed: int) -> None:
        """Make room for log-probabilities of ``needed`` positions."""
        held = self._logprobs.shape[1]
        if needed > held:
            grown = np.zeros((len(self._logprobs), max(needed, 2 * held, 128)), dtype=np.float32)
            grown[:, :held] = self._logprobs
            self._logprobs = grown

    def _finishes(self, order: Ints, tokens: Ints, length: Ints) -> dict[int, tuple[Finish, str | None]]:
        """Row → why it ended, for the rows that did: EOS before stop string before length."""
        assert self._is_eos is not None
        eos, full = self._is_eos[tokens], length >= self._end[order]
        finishes: dict[int, tuple[Finish, str | None]] = {}
        if (eos | full).any():
            finishes.update((row, ("length", None)) for row in order[full].tolist())
            finishes.update((row, ("eos", None)) for row in order[eos].tolist())
        if self._matcher is not None:
            for row in order[self._matcher.suspects(tokens) & ~eos].tolist():
                found = self._matcher.find(self._session.tokens(row, int(self._begin[row])))
                if found is not None:
                    finishes[row] = "stop", found
        return finishes

    def _segment(self, row: int, finish: Finish, stop: str | None) -> Segment:
        return Segment(row, *self._gained(row), finish, stop)

    def _gained(self, row: int) -> tuple[list[int], list[float]]:
        begin, end = int(self._begin[row]), self._session.length(row)
        return self._session.tokens(row, begin), self._logprobs[row, begin:end].tolist()
