"""The state of a run on its way to a returning replica: files of a checkpoint, then the steps taken since.

A donor answers from memory, each rank for the same rank of the newcomer. An update is what a donor applied in one step: the
summed gradient of that rank's part, and the small state after it. A newcomer feeds it to its own engine as if it had computed
it, so that its weights, moments and schedule are those of the donor to the bit.
"""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from distill.checkpoint import Checkpoints
from distill.distributed import all_or_nothing, gathered, rank
from distill.errors import CheckpointError
from distill.replicas.books import Row, SharedLog
from ncclx_py.elastic.member import Fetch, Member
from ncclx_py.elastic.states import Gone, StateClient, StateServer, find_donor

if TYPE_CHECKING:
    from distill.trainer import Trainer

_LENGTH = struct.Struct("!Q")


Update = tuple[list[Tensor], dict[str, Any], list[Row]]  # a step's gradient, the small state after it, its figures
ROWS = "rows.json"  # the last figures of the run, beside the files of the state


def pack_update(gradients: list[Tensor], state: dict[str, Any], rows: list[Row]) -> bytes:
    """See ``Update``."""
    header = json.dumps([state, rows]).encode()
    tensors = {f"{number:06d}": gradient.detach().cpu().contiguous() for number, gradient in enumerate(gradients)}
    return _LENGTH.pack(len(header)) + header + save_tensors(tensors)


def unpack_update(data: bytes) -> Update:
    """Raises Gone for bytes that are no update."""
    try:
        (length,) = _LENGTH.unpack_from(data)
        state, rows = json.loads(data[_LENGTH.size : _LENGTH.size + length])
        tensors = load_tensors(data[_LENGTH.size + length :])
    except Exception as error:
        raise Gone(f"the donor sent no update: {error}") from None
    return [tensors[name] for name in sorted(tensors)], state, rows


class Donor:
    """This rank's side of giving the state away, the figures of `log` (on rank 0) included."""

    def __init__(self, member: Member, linger_s: float) -> None:
        self.member = member
        self.log: SharedLog | None = None
        self.server = StateServer(member.client.host, member.client.port, linger_s)
        self._applied: tuple[int, list[Tensor]] | None = None

    def applied(self, step: int, gradients: list[Tensor]) -> None:
        """The sums that ``step`` is taken with; the engine may change its tensors from here on."""
        if self.server.serving:
            self._applied = (step, [gradient.clone() for gradient in gradients])

    def serve(self, trainer: Trainer, sessions: tuple[str, ...]) -> None:
        """At the beginning of a step: hand over the last update, and the state to those who are new. All ranks together."""
        if self._applied is not None:
            step, gradients = self._applied
            self.server.add_update(step, pack_update(gradients, trainer.state(), self._rows()[-1:]))
            self._applied = None
        new = [session for session in sessions if not self.server.has(session)]
        if new:
            files = trainer.checkpoints.snapshot(
                trainer.engine, trainer.done, trainer.state(), trainer.teachers.state()
            )
            if rank() == 0:
                files[ROWS] = json.dumps(self._rows()).encode()
            for session in new:
                self.server.open(session, trainer.done, files)
        for session in sessions:
            self.server.publish(self.member.client, self.member.replica, rank(), session)
        self.server.keep(sessions)

    def _rows(self) -> list[Row]:
        return [] if self.log is None else self.log.rows

    def close(self) -> None:
        self.server.close()


class Feed:
    """This rank's side of fetching a state. Every method raises Gone when the donor does not answer."""

    def __init__(self, member: Member, fetch: Fetch, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while (where := find_donor(member.client, fetch.donor, rank(), fetch.session)) is None:
            if time.monotonic() > until:
                raise Gone(f"replica {fetch.donor} has not offered its state within {timeout_s:g} s")
            time.sleep(0.05)
        self._client, self._timeout_s = StateClient(where, fetch.session, timeout_s), timeout_s
        self._next: tuple[int, bytes] | None = None

    def write_files(self, folder: Path) -> int:
        """Put the files of the state into a folder; returns its step."""
        step, files = self._client.files()
        for name, data in files.items():
            if Path(name).name != name or name.startswith("."):
                raise Gone(f"the donor sent a file named {name!r}")
            (folder / name).write_bytes(data)
        return step

    def has(self, step: int, wait: bool) -> bool:
        """Whether the update of ``step`` is there: now, or with ``wait`` before the timeout."""
        until = time.monotonic() + (self._timeout_s if wait else 0.0)
        while self._next is None or self._next[0] != step:
            data = self._client.update(step, wait)
            if data is not None:
                self._next = (step, data)
            elif time.monotonic() >= until:
                return False
        return True

    def update(self, step: int) -> Update:
        """What was applied in ``step``."""
        if not self.has(step, wait=True):
            raise Gone(f"the donor has not handed over step {step} within {self._timeout_s:g} s")
        assert self._next is not None
        return unpack_update(self._next[1])

    def close(self) -> None:
        self._client.close()


def load_fetched(trainer: Trainer, feed: Feed | None, problem: str | None, folder: Path) -> list[Row]:
    """Load the state that all ranks fetch into ``folder``; returns the last figures, on rank 0.

    Raises Gone on every rank when one of them got none.
    """
    with all_or_nothing(CheckpointError):
        if rank() == 0:
            folder.mkdir(parents=True)
    step = 0
    if feed is not None:
        try:
            step = feed.write_files(folder)
        except (Gone, OSError) as error:
            problem = f"rank {rank()}: {error}"
    answers = gathered((problem, step))
    if found := next((text for text, _ in answers if text is not None), None):
        raise Gone(found)
    if len({step for _, step in answers}) > 1:
        raise Gone(f"the donor's ranks sent different steps: {[step for _, step in answers]}")
    checkpoints = Checkpoints(folder.parent, 1)
    checkpoints.seal(folder, step)
    trainer.load(checkpoints, folder)
    return json.loads((folder / ROWS).read_text()) if rank() == 0 else []
