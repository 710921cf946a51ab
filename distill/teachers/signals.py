"""What a teacher says about T positions: full logits, hidden states with the head beside them, top-k, or the sampled token.

A method reads ``logits()`` where it needs the whole distribution, ``logprobs_at(ids)`` where the tokens that were written are
enough, and ``DivergenceSpec`` takes any kind. ``signal_of`` makes each kind from the final hidden states, for every
placement that holds the model; ``bytes_per_token`` is what each costs to send or to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from distill.errors import DistillError
from distill.kernels import LinearLogits, token_logprobs
from distill.models import scale_and_cap, scaled_and_capped


class SignalError(DistillError):
    """A method asked a signal for what it does not hold."""


@dataclass(frozen=True, slots=True)
class Head:
    """What turns final hidden states into logits: ``tanh(s·(h Wᵀ + b) / c)·c``, as some architectures scale and cap them."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[T, H]`` → logits ``[T, V]``, in the dtype of both."""
        return scaled_and_capped(functional.linear(hidden, self.weight, self.bias), self.scale, self.softcap)


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal LM, its parameters not copied."""
    linear = model.get_output_embeddings()
    assert isinstance(linear, nn.Linear)
    return Head(linear.weight, linear.bias, *scale_and_cap(model))


@dataclass(frozen=True, slots=True)
class FullLogits:
    """Logits ``[T, V]`` of the whole vocabulary."""

    kind: ClassVar[str] = "logits"
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def logits(self) -> Tensor:
        return self.values

    def operand(self) -> tuple[Tensor | LinearLogits, dict[str, Any]]:
        """What functions of ``distill.kernels`` take as a student's logits, and the options that go with it."""
        return self.values, {}

    def logprobs_at(self, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
        """log p(id) ``[T]`` fp32 of ids ``[T]``, differentiable; 0 without gradient for negative ids."""
        return _logprobs_at(self, token_ids, temperature)


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Final hidden states ``[T, H]`` and the head that reads them."""

    kind: ClassVar[str] = "hidden"
    hidden: Tensor
    head: Head
    budget: int | None = None  # bytes of fp32 logits alive at a time; None: the kernels' default

    def __len__(self) -> int:
        return len(self.hidden)

    def logits(self) -> Tensor:
        """``[T, V]``, computed at each call."""
        return self.head.logits(self.hidden.to(self.head.weight.dtype))

    def operand(self) -> tuple[Tensor | LinearLogits, dict[str, Any]]:
        """As ``FullLogits.operand``; logits are formed a few rows at a time where they are used."""
        head = self.head
        logits = LinearLogits(self.hidden.to(head.weight.dtype), head.weight, head.bias, self.budget)
        return logits, {"student_scale": head.scale, "student_softcap": head.softcap}

    def logprobs_at(self, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
        """As ``FullLogits.logprobs_at``."""
        return _logprobs_at(self, token_ids, temperature)


def _logprobs_at(signal: FullLogits | HiddenStates, token_ids: Tensor, temperature: float) -> Tensor:
    logits, options = signal.operand()
    values, _ = token_logprobs(logits, token_ids.unsqueeze(-1), temperature, **options)
    return values.squeeze(-1)


@dataclass(frozen=True, slots=True)
class TopK:
    """The K most probable ids of each position and their log-probabilities under the whole vocabulary, at temperature 1."""

    kind: ClassVar[str] = "topk"
    ids: Tensor  # [T, K] int64, distinct within a position; negative: none
    logprobs: Tensor  # [T, K] fp32

    def __len__(self) -> int:
        return len(self.ids)

    def logits(self) -> Tensor:
        raise SignalError(
            _LACKS.format("topk", "the whole distribution", "teacher.signal=logits or teacher.signal=hidden")
        )

    def logprobs_at(self, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
        remedy = "teacher.signal=sampled, logits or hidden"
        raise SignalError(_LACKS.format("topk", "the log-probability of a token outside its list", remedy))


@dataclass(frozen=True, slots=True)
class SampledToken:
    """log p of the token that follows each position, ``[T]`` fp32, at temperature 1."""

    kind: ClassVar[str] = "sampled"
    logprobs: Tensor
    known: Tensor | None = None  # [T] bool: positions that the teacher says something about; None: all

    def known_ids(self, token_ids: Tensor) -> Tensor:
        """``token_ids [T]`` with −1, which losses skip, where the teacher says nothing."""
        return token_ids if self.known is None else token_ids.masked_fill(~self.known, -1)

    def __len__(self) -> int:
        return len(self.logprobs)

    def logits(self) -> Tensor:
        remedy = "teacher.signal=logits or teacher.signal=hidden"
        raise SignalError(_LACKS.format("sampled", "the whole distribution", remedy))

    def logprobs_at(self, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
        """log p of ``token_ids``, which must be the batch's own targets; 0 for negative ids."""
        if temperature != 1.0:
            raise SignalError(
                _LACKS.format("sampled", f"log-probabilities at temperature {temperature}", "temperature 1")
            )
        return torch.where(token_ids >= 0, self.logprobs, 0.0)


@dataclass(frozen=True, slots=True)
class Parts:
    """Whole distributions of several teachers, each about its own of the T positions: vocabularies and heads may differ."""

    parts: Sequence[tuple[Tensor, FullLogits | HiddenStates]]  # places [t], ascending, and what is said about them

    @property
    def kind(self) -> str:
        return self.parts[0][1].kind

    def __len__(self) -> int:
        return sum(len(places) for places, _ in self.parts)

    def logits(self) -> Tensor:
        """``[T, V]`` of the largest vocabulary, computed at each call; −inf where a teacher's own ends."""
        found = [signal.logits() for _, signal in self.parts]
        width = max(logits.shape[1] for logits in found)
        return self.joined([functional.pad(x, (0, width - x.shape[1]), value=-torch.inf) for x in found])

    def logprobs_at(self, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
        """As ``FullLogits.logprobs_at``."""
        return self.joined([signal.logprobs_at(token_ids[places], temperature) for places, signal in self.parts])

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """What belongs to each part's positions ``[t, …]`` in the order of all, ``[T, …]``."""
        return torch.cat(list(values))[torch.cat([places for places, _ in self.parts]).argsort()]


Signal = FullLogits | HiddenStates | TopK | SampledToken | Parts

_LACKS = "teacher.signal={} does not hold {}; use {}"


def signal_of(kind: str, head: Head, hidden: Tensor, token_ids: Tensor, top_k: int) -> Signal:
    """The signal ``kind`` from a teacher's final hidden states ``[T, H]``; ``token_ids [T]`` are the tokens that follow.

    ``top_k`` is cut to the vocabulary. Logits of positions whose signal is small are formed in chunks.
    """
    if kind == "hidden":
        return HiddenStates(hidden, head)
    if kind == "logits":
        return FullLogits(head.logits(hidden))
    parts = [_small(kind, head, rows, ids, top_k) for rows, ids in zip(*_chunks(head, hidden, token_ids), strict=True)]
    if kind == "sampled":
        return SampledToken(torch.cat([part[0] for part in parts]))
    return TopK(torch.cat([part[0] for part in parts]).long(), torch.cat([part[1] for part in parts]))


ROW_BUDGET = 1 << 25  # elements of a [rows, V] block of logits


def _chunks(head: Head, hidden: Tensor, token_ids: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    rows = max(1, ROW_BUDGET // len(head.weight))
    return hidden.split(rows), token_ids.split(rows)  # no rows: one empty chunk


def _small(kind: str, head: Head, hidden: Tensor, token_ids: Tensor, top_k: int) -> tuple[Tensor, ...]:
    logits = head.logits(hidden)
    if kind == "sampled":
        return (FullLogits(logits).logprobs_at(token_ids),)
    logprobs, ids = logits.float().log_softmax(-1).topk(min(top_k, logits.shape[-1]), -1)
    return ids, logprobs


def bytes_per_token(kind: str, wire: torch.dtype, hidden_size: int, vocabulary: int, top_k: int) -> int:
    """What one position costs: hidden states and logits in ``wire`` (one byte with a scale of four per row for float8), ids in
    four bytes, log-probabilities in four."""
    if kind == "hidden":
        return hidden_size * wire.itemsize + (4 if wire.itemsize == 1 else 0)
    if kind == "logits":
        return vocabulary * wire.itemsize
    return 8 * min(top_k, vocabulary) if kind == "topk" else 4
