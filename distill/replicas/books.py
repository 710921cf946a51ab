"""What replicas write: the figures of each step once, whoever dies, and who made which sample.

``metrics.jsonl`` is written by the replica that leads. Each keeps the last rows in memory, a newcomer those of its donor: one
that takes over adds what is missing. It replaces the file when it opens it, so that an earlier leader which wakes up writes
into a file that is gone.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import CheckpointError
from distill.metrics import MetricsLog, read_metrics

if TYPE_CHECKING:
    from distill.trainer import Trainer

KEPT = 256  # rows in memory
Row = tuple[int, dict[str, float]]  # a step and its figures


class SharedLog:
    """The metrics of a run of several replicas; ``leads`` says whether this one writes."""

    def __init__(self, trainer: Trainer, leads: Callable[[], bool]) -> None:
        self._trainer, self._leads = trainer, leads
        self._rows: deque[Row] = deque(maxlen=KEPT)
        self._log: MetricsLog | None = None

    def write(self, step: int, figures: dict[str, float]) -> None:
        """The figures of a committed step."""
        self._rows.append((step, figures))
        if not self._leads():
            self.close()
        elif self._log is None:
            self._take_over(step)
        else:
            self._log.write(step, figures)

    @property
    def rows(self) -> list[Row]:
        """The last rows, oldest first."""
        return list(self._rows)

    def learn(self, rows: Sequence[Row]) -> None:
        """Take over rows of steps that other replicas made; one of them may have made the file anew, so this one opens it again."""
        self.close()
        self._rows.extend((int(step), figures) for step, figures in rows)

    def _take_over(self, step: int) -> None:
        trainer = self._trainer
        there = [row["step"] for row in read_metrics(trainer.folder.metrics) if row["step"] < step]
        missing = [(number, figures) for number, figures in self._rows if number not in there]
        kept = min(number for number, _ in missing) - 1
        self._log = MetricsLog(trainer.folder, trainer.config.run, kept, trainer.config.resolved)
        for number, figures in missing:
            self._log.write(number, figures)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None


class SampleBook:
    """``replicas/ID/samples.jsonl``: a line before each vote on a step, with the samples that this replica has made for it.

    Together with the store's journal, which says in which epoch a step was committed, it proves that no sample was lost or
    counted twice. Use it on rank 0.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(path)
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, epoch: int, members: Sequence[int], samples: Sequence[int]) -> None:
        """Raises CheckpointError on a full disk."""
        line = {"step": step, "epoch": epoch, "members": list(members), "samples": list(samples)}
        data = json.dumps(line).encode() + b"\n"
        try:
            if self._file.write(data) != len(data):
                raise OSError("no space left")
        except OSError as error:
            raise CheckpointError(
                f"{self._file.name} could not be written ({error.strerror or error}); free some space and start this replica again"
            ) from None

    def close(self) -> None:
        self._file.close()


def _end_last_line(path: Path) -> None:
    """A kill may have cut the last line short: close it, so that what follows stands on a line of its own."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def read_samples(path: Path) -> dict[tuple[int, int], list[int]]:
    """(step, epoch) → samples, of whole lines."""
    found: dict[tuple[int, int], list[int]] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            found[row["step"], row["epoch"]] = row["samples"]
        except (ValueError, KeyError, TypeError):
            continue  # cut short by a kill: it was never voted on
    return found
