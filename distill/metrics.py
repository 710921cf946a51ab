"""What a run measures, written once per step: ``metrics.jsonl``, TensorBoard events, optionally Weights & Biases.

Keys are flat ``area/name``. A resumed run cuts the file back to its checkpoint, so that every step stands there once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from distill.config import RunSection
from distill.errors import CheckpointError
from distill.runs import RunFolder, write_atomically


class MetricsLog:
    """Writer of one run's figures; make one on rank 0 only."""

    def __init__(self, folder: RunFolder, options: RunSection, start_step: int, resolved: dict[str, Any]) -> None:
        cut_back(folder.metrics, start_step)
        self._file: TextIO = folder.metrics.open("a", encoding="utf-8")
        self._writer: Any = None
        if options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder.tensorboard), purge_step=start_step + 1)
        self._wandb: Any = None
        if options.wandb:
            import wandb

            self._wandb = wandb.init(project=options.wandb, config=resolved, dir=str(folder.path), resume="allow")

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Append one row; the kernel has it before the next step starts. Raises CheckpointError where it cannot be written."""
        try:
            self._file.write(json.dumps({"step": step, **figures}) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._file.name} could not be written ({error.strerror}); free some space and run the same command again "
                "to continue from the last checkpoint"
            ) from None
        if self._writer is not None:
            for key, value in figures.items():
                self._writer.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(figures, step=step)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a last line cut short by a kill is left out, and so is all that follows a line that
    is no row."""
    rows = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                break
            rows.append(row)
    return rows


def cut_back(path: Path, step: int) -> None:
    """Drop rows after ``step``: a run that continues from a checkpoint writes them again."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
