"""The teacher's end: a rank that holds frozen models and answers ticks until the students say that it is over.

While it waits for the next request it sleeps, and while it computes the next header and the last answers travel. It answers in the
order in which it is asked; what a batch of one student gets does not depend on the others.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from distill.distributed import device
from distill.teachers.frozen import FrozenModel
from distill.teachers.separate.bridge import CHECK, END, HEADER, SCORE, Bridge, Passage
from distill.teachers.separate.requests import from_words
from distill.teachers.separate.services import PRINT_BYTES, STATS_BYTES, Service
from distill.teachers.separate.sharding import ShardedModel

UNSENT = 2  # answers under way at a time


class Server:
    """One teacher rank; ``models`` by the number of their service."""

    def __init__(self, bridge: Bridge, services: Mapping[int, Service], models: Mapping[int, FrozenModel]) -> None:
        self.bridge, self.services, self.models = bridge, dict(services), models
        self._sending: deque[Passage] = deque()
        self._since: float | None = None  # time of the last answer

    def move_to(self, bridge: Bridge) -> None:
        """Serves at another bridge, after the last one has failed; what was under way there is forgotten."""
        before, after = self.bridge.seats.ranks, bridge.seats.ranks
        self.services = {number: service.without(before, after) for number, service in self.services.items()}
        self.bridge = bridge
        self._sending.clear()
        self._since = None

    def run(self) -> int:
        """Serves to the end; returns the exit status that the students leave with. Raises BridgeError."""
        students, size = self.bridge.seats.students, len(self.bridge.seats.ranks)
        silence = torch.zeros(size, HEADER, dtype=torch.int64, device=self.bridge.device)
        passage = self.bridge.headers(silence)
        while True:
            wanted = passage.wait().view(size, HEADER).tolist()
            ends, counts = wanted[0][0] == END, [row[2] for row in wanted]
            none = torch.empty(0, dtype=torch.int32, device=self.bridge.device)
            words = self.bridge.words(none, [0] * size, counts).wait()
            if not ends:
                passage = self.bridge.headers(silence)
            parts = [] if ends else self._answers(wanted[:students], list(words.split(counts))[:students])
            self._send(parts + [none.view(torch.uint8)] * (size - len(parts)))
            if ends:
                self._settle(0)
                return int(wanted[0][3])

    def _answers(self, wanted: list[list[int]], words: list[Tensor]) -> list[Tensor]:
        """Bytes for each student."""
        began = time.perf_counter()
        self._since = began if self._since is None else self._since
        want, number = wanted[0][:2]
        if want == CHECK:
            return [self._print(number)] * len(wanted)
        assert want == SCORE
        answers = [self._score(number, part) for part in words]
        if device().type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        stats = torch.frombuffer(bytearray(struct.pack("dd", now - began, now - self._since)), dtype=torch.uint8)
        assert len(stats) == STATS_BYTES
        answers[0] = torch.cat([stats.to(answers[0].device), answers[0]])
        self._since = now
        return answers

    def _score(self, number: int, words: Tensor) -> Tensor:
        nothing = torch.empty(0, dtype=torch.uint8, device=self.bridge.device)
        service, model = self.services[number], self.models.get(number)
        if isinstance(model, ShardedModel):
            words = model.share(words)
        if model is None or not len(words):
            return nothing
        batch = from_words(words).to(device())
        if self.bridge.seats.me not in service.places:  # holds a part of the model; another rank answers
            model.hidden(batch)
            return nothing
        return service.pack(model.signal(batch, service.kind, service.top_k)).to(self.bridge.device)

    def _print(self, number: int) -> Tensor:
        values = struct.pack("dd", *self.models[number].fingerprint()) if number in self.models else b""
        if self.bridge.seats.me not in self.services[number].places:
            return torch.empty(0, dtype=torch.uint8, device=self.bridge.device)
        assert len(values) == PRINT_BYTES
        return torch.frombuffer(bytearray(values), dtype=torch.uint8).to(self.bridge.device)

    def _send(self, parts: list[Tensor]) -> None:
        sent = torch.cat(parts)
        self._settle(UNSENT - 1)
        self._sending.append(self.bridge.answers(sent, [len(part) for part in parts], [0] * len(parts)))

    def _settle(self, left: int) -> None:
        """Waits until at most so many answers are under way."""
        while len(self._sending) > left:
            self._sending.popleft().wait()
