"""A barrier that names the ranks that did not come: every rank reports to rank 0, which answers all of them.

A rank that dies is named at once, one that is late when the timeout has passed. The ranks that came learn the same names,
and the group lives on: a report that comes too late gets no answer.
"""

from __future__ import annotations

import time
from datetime import timedelta

import torch
from torch import Tensor

from ncclx_py.errors import Call, CollectiveError, CollectiveTimeout
from ncclx_py.transport.letters import Letter
from ncclx_py.transport.mail import Mailbox

_TAG = 1 << 62  # and the number of the call: no program's message has it
_TEXT = 4096  # bytes of an answer
_MARGIN = 1.0  # seconds that the answer may take beyond the timeout


def monitored_barrier(mail: Mailbox, call: Call, timeout: timedelta, wait_all_ranks: bool) -> None:
    """Raises CollectiveError where a rank did not come within `timeout`: on rank 0 it names the first, or all of them where
    it is to wait for all."""
    until = time.monotonic() + timeout.total_seconds()
    meeting = _Meeting(mail, call, until, timeout)
    if call.rank:
        meeting.report()
    else:
        meeting.collect(wait_all_ranks)


class _Meeting:
    """The messages of one barrier on this rank."""

    def __init__(self, mail: Mailbox, call: Call, until: float, timeout: timedelta) -> None:
        self._mail, self._call, self._until, self._timeout = mail, call, until, timeout

    def report(self) -> None:
        answer = torch.zeros(_TEXT, dtype=torch.uint8)
        letters = [self._send(torch.ones(1, dtype=torch.uint8), 0), self._receive(answer, 0)]
        until = self._until + _MARGIN
        if not all(self._through(letter, until) for letter in letters):
            raise CollectiveTimeout(
                f"rank {self._call.rank} came, but rank 0 did not answer within {self._timeout.total_seconds():g} s. Rank 0 is "
                "late, or had given this rank up: see its log."
            )
        text = bytes(answer.numpy()).rstrip(b"\0").decode()
        if text:
            raise CollectiveError(f"rank 0 reports: {text}")

    def collect(self, wait_all_ranks: bool) -> None:
        others = range(1, self._call.size)
        reports = {rank: self._receive(torch.zeros(1, dtype=torch.uint8), rank) for rank in others}
        missing: dict[int, str] = {}
        for rank, letter in reports.items():
            try:
                if not self._through(letter, self._until):
                    missing[rank] = f"did not come within {self._timeout.total_seconds():g} s"
            except CollectiveError as error:
                missing[rank] = f"did not come: {error}"
            if missing and not wait_all_ranks:
                break
        text = _verdict(missing)
        answer = torch.zeros(_TEXT, dtype=torch.uint8)
        encoded = text.encode()[:_TEXT]
        if encoded:
            answer[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        came = [rank for rank, letter in reports.items() if letter.is_completed() and letter.error is None]
        answers = [self._send(answer, rank) for rank in came]
        if missing:
            late = any("within" in why for why in missing.values())
            raise (CollectiveTimeout if late else CollectiveError)(f"{text} See the logs of these ranks.")
        for letter in answers:
            self._through(letter, self._until + _MARGIN)

    def _through(self, letter: Letter, until: float) -> bool:
        """False when it is not through in time; then nobody waits for it any more. Raises its error."""
        if not self._mail.wait_for(letter, until - time.monotonic()):
            self._mail.abandon(letter)
            return False
        return letter.wait()

    def _send(self, tensor: Tensor, peer: int) -> Letter:
        return self._mail.send(tensor, tensor.dtype, peer, _TAG + self._call.sequence, self._part("send", peer))

    def _receive(self, tensor: Tensor, peer: int) -> Letter:
        return self._mail.receive(tensor, tensor.dtype, peer, _TAG + self._call.sequence, self._part("recv", peer))

    def _part(self, op: str, peer: int) -> Call:
        call = self._call
        return Call(op, call.group, call.rank, call.size, call.sequence, message=True, peer=peer)


def _verdict(missing: dict[int, str]) -> str:
    """As in "ranks 1, 2 did not come within 2 s."; "" where nobody is missing."""
    reasons: dict[str, list[int]] = {}
    for rank, why in missing.items():
        reasons.setdefault(why, []).append(rank)
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} {why.rstrip('.')}"
        for why, ranks in reasons.items()
    ) + ("." if missing else "")
