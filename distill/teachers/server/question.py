"""One text put to a server: the request that asks what the teacher thinks of each token, and the answer as arrays.

    question = Question("topk", top_k=64, model="qwen3")
    answer = question.read(reply, ids, places)       # about ids[places], each after all that precede it

vLLM's ``prompt_logprobs`` on ``/v1/completions`` with token ids as the prompt: one entry per token, a dictionary from id to
log-probability that holds the token itself and the K most likely ones. All log-probabilities are natural ones under the whole
vocabulary at temperature 1. The answer's numbers are decimals of fp32 values, written so that they read back as the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.endpoints import Reply

PATH = "/v1/completions"
IMPOSSIBLE = -9998.0  # vLLM sends −9999 for −infinity, which JSON lacks


class BadAnswer(Exception):
    """An answer that came, and cannot be used: the message says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said about t tokens. ``ids`` is None for ``sampled`` (``logprobs [t]``) and ``logits`` (``[t, V]``)."""

    ids: NDArray[np.int64] | None  # [t, K], most likely first
    logprobs: NDArray[np.float32]  # [t, K], [t, V] or [t]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about every text: ``kind`` is topk, sampled or logits, ``top_k`` the ids per token (logits: all of them)."""

    kind: str
    top_k: int
    model: str

    @property
    def wanted(self) -> int:
        """Log-probabilities per token beside the token's own."""
        return 0 if self.kind == "sampled" else self.top_k

    def data(self, ids: Sequence[int], temperature: float = 1.0) -> bytes:
        """The body of a request about ``ids``. What a server may set otherwise by default is named."""
        body = {
            "model": self.model,
            "prompt": list(ids),
            "add_special_tokens": False,
            "prompt_logprobs": self.wanted,
            "max_tokens": 1,
            "temperature": temperature,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        return json.dumps(body, separators=(",", ":")).encode()

    def read(self, reply: Reply, ids: Sequence[int], places: Sequence[int]) -> Answer:
        """What ``reply`` says about ``ids[places]``, places ≥ 1. Raises BadAnswer for anything but a whole, finite answer."""
        rows = self._rows(reply, ids)
        if self.kind == "sampled":
            values = [_logprob(rows[place], ids[place], place) for place in places]
            return Answer(None, _finite(np.array(values, dtype=np.float64)).astype(np.float32))
        for place in places:
            _logprob(rows[place], ids[place], place)  # the right token stands there
        found = [rows[place] for place in places]
        least = min(map(len, found), default=self.top_k)
        if least < self.top_k:
            raise BadAnswer(f"{least} log-probabilities for a token, where {self.top_k} were asked for")
        try:
            return self._most_likely(found)
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise BadAnswer(f"its prompt_logprobs cannot be read ({type(error).__name__}: {error})") from None

    def _rows(self, reply: Reply, ids: Sequence[int]) -> list[Any]:
        """One entry per token of ``ids``."""
        if not reply.is_json:
            raise BadAnswer(f"what came is no JSON ({str(reply.answer)[:60]!r} …)")
        try:
            served, rows = reply.answer.get("model", self.model), reply.answer["choices"][0].get("prompt_logprobs")
        except (AttributeError, KeyError, IndexError, TypeError):
            raise BadAnswer("what came has no choices") from None
        if served != self.model:
            raise BadAnswer(f"'{served}' answers in the place of '{self.model}'")
        if not isinstance(rows, list):
            raise BadAnswer("it sent no prompt_logprobs")
        if len(rows) != len(ids):
            raise BadAnswer(f"it spoke of {len(rows)} tokens and was sent {len(ids)}")
        return rows

    def _most_likely(self, found: Sequence[dict[str, Any]]) -> Answer:
        """The K most likely of each entry, which holds K or K + 1: the token itself comes too where it is not among them."""
        count, width = len(found), max(map(len, found), default=self.top_k)
        sizes = np.fromiter(map(len, found), np.int64, count)
        filled = np.arange(width)[None, :] < sizes[:, None]
        ids, values = np.full((count, width), -1, np.int64), np.full((count, width), -math.inf)
        ids[filled] = np.array(list(map(int, chain.from_iterable(found))), dtype=np.int64)
        values[filled] = _finite(np.array([e["logprob"] for row in found for e in row.values()], dtype=np.float64))
        order = np.argsort(-values, axis=1, kind="stable")[:, : self.top_k]
        ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1).astype(np.float32)
        if self.kind == "topk":
            return Answer(ids, logprobs)
        by_id = np.argsort(ids, axis=1)
        if count and not np.array_equal(np.take_along_axis(ids, by_id, 1), np.tile(np.arange(self.top_k), (count, 1))):
            raise BadAnswer(f"its log-probabilities are not those of the ids 0 to {self.top_k - 1}, each once")
        return Answer(None, np.take_along_axis(logprobs, by_id, 1))


def _logprob(row: Any, token: int, place: int) -> float:
    """Of the token that stands at ``place``."""
    try:
        return float(row[str(token)]["logprob"])
    except (TypeError, KeyError, ValueError):
        said = ", ".join(list(row)[:3]) if isinstance(row, dict) else "nothing"
        raise BadAnswer(f"token {place} of the text is {token}, and it spoke of {said}") from None


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    bad = values[~(values > IMPOSSIBLE) | (values == math.inf)]
    if len(bad):
        what = "-inf" if bad[0] <= IMPOSSIBLE else str(bad[0])
        raise BadAnswer(f"a log-probability is {what}")
    return values
