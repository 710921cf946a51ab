"""Checkpoints that are whole or absent.

DeepSpeed writes its usual files into ``checkpoints/.partial_step_N``; only when every rank has written and synced its
part does rank 0 add a manifest and rename the folder to ``step_N``. A kill at any moment leaves the previous
checkpoint; a full disk leaves it too, and every rank raises the same error.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from distill.distributed import all_or_nothing, from_rank_0, gathered, rank, world_size
from distill.engine import TrainEngine
from distill.errors import CheckpointError
from distill.runs import replace_folder

MANIFEST = "manifest.json"
DEEPSPEED_RECORDS: list[Any] = [LossScaler, ZeroStageEnum, fragment_address]  # DeepSpeed's own classes in its files
FROZEN = "frozen_models.pt"  # what is the same on every rank and belongs to no optimizer
PART = "vocabulary_{:05d}.pt"  # one for each part of a vocabulary that is split over ranks


class RecordingWriter(TorchCheckpointEngine):
    """DeepSpeed's file writer, except that a failed write is remembered instead of raised.

    DeepSpeed runs barriers between the files of a checkpoint: an exception on one rank there would leave the others waiting.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if self.failure is not None:
            return
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            # torch reports that its archive is cut short, in words of its own; what the disk said is the error before it.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            self.failure = f"{Path(path).name}: {getattr(cause, 'strerror', None) or str(cause).splitlines()[0]}"

    def load(self, path: str, map_location: Any = None) -> Any:
        """Tensors, plain values, and three records of DeepSpeed's: nothing in the file can run code."""
        with torch.serialization.safe_globals(DEEPSPEED_RECORDS):
            return torch.load(path, map_location=map_location, weights_only=True)


class MemoryWriter(RecordingWriter):
    """The same files, kept in memory by name."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There is no folder."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        self.files[Path(path).name] = buffer.getvalue()


class Checkpoints:
    """The checkpoints of one run folder. All ranks call every method together."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, engine: TrainEngine, step: int, state: dict[str, Any], frozen: dict[str, Any]) -> None:
        """Write ``step_<step>``: the engine, ``state`` (small), and rank 0's ``frozen`` (may hold a model's weights).

        Raises CheckpointError on every rank if any rank could not write its part.
        """
        target = self.folder / f"step_{step:08d}"
        partial = self.folder / f".partial_{target.name}"
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        with all_or_nothing(CheckpointError):
            if rank() == 0:
                partial.mkdir(parents=True)
        writer = RecordingWriter()
        engine.deepspeed.checkpoint_engine = writer
        engine.deepspeed.save_checkpoint(str(self.folder), tag=partial.name, client_state=state, save_latest=False)
        if rank() == 0:
            writer.save(frozen, str(partial / FROZEN))
        part = engine.part_state()
        if part is not None:
            writer.save(part, str(partial / PART.format(part["place"])))
        failures = [f"rank {i}: {text}" for i, text in enumerate(gathered(writer.failure)) if text]
        if failures:
            self._give_up(partial, target, failures[0])
        with all_or_nothing(CheckpointError):
            if rank() == 0:
                self._publish(partial, target, step)

    def snapshot(
        self, engine: TrainEngine, step: int, state: dict[str, Any], frozen: dict[str, Any]
    ) -> dict[str, bytes]:
        """What `save` would write on this rank, in memory: file name → content. `seal` makes a checkpoint of all ranks' files."""
        writer = MemoryWriter()
        engine.deepspeed.checkpoint_engine = writer
        tag = f"step_{step:08d}"
        engine.deepspeed.save_checkpoint(str(self.folder), tag=tag, client_state=state, save_latest=False)
        if rank() == 0:
            writer.save(frozen, FROZEN)
        return writer.files

    def seal(self, checkpoint: Path, step: int) -> None:
        """Declare complete the files that all ranks have put into a folder."""
        with all_or_nothing(CheckpointError):
            if rank() == 0:
                _write_manifest(checkpoint, step)

    def _give_up(self, partial: Path, target: Path, failure: str) -> None:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        good = self.latest()
        error = CheckpointError(
            f"checkpoint {target} could not be written ({failure}); "
            f"{f'the last good one is {good}' if good else 'there is no earlier one'}. "
            "Free some space and run the same command again to continue"
        )
        error.on_every_rank, error.exit_status = True, 1
        raise error

    def _publish(self, partial: Path, target: Path, step: int) -> None:
        _write_manifest(partial, step)
        replace_folder(partial, target)
        for old in self._complete()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        for abandoned in self.folder.glob(".partial_*"):
            shutil.rmtree(abandoned, ignore_errors=True)

    def _complete(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step_*") if (path / MANIFEST).is_file())

    def latest(self) -> Path | None:
        """The newest published checkpoint as rank 0 sees it, the same on every rank."""
        newest = None
        if rank() == 0 and (complete := self._complete()):
            newest = complete[-1]
        return from_rank_0(newest)

    def load(self, engine: TrainEngine, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Put the engine back where it was; returns the ``state`` and ``frozen`` given to ``save``.

        Raises CheckpointError for files that are missing, cut short, or from another number of ranks.
        """
        with all_or_nothing(CheckpointError):
            verify(checkpoint, world_size())
        engine.deepspeed.checkpoint_engine = RecordingWriter()
        with all_or_nothing(CheckpointError):
            path, state = engine.deepspeed.load_checkpoint(str(self.folder), tag=checkpoint.name)
            if path is None:
                raise CheckpointError(f"{checkpoint} could not be loaded by DeepSpeed; remove it to use the one before")
            frozen = torch.load(checkpoint / FROZEN, map_location="cpu", weights_only=True)
            place = engine.part
            if place is not None:
                path = checkpoint / PART.format(place)
                engine.restore_part(torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None)
        return state, frozen


def _write_manifest(folder: Path, step: int) -> None:
    sizes = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    with (folder / MANIFEST).open("w") as file:
        json.dump({"step": step, "world_size": world_size(), "files": sizes}, file)


def verify(checkpoint: Path, ranks: int) -> None:
    """Raise CheckpointError unless every file of the manifest is there in full and ``ranks`` ranks wrote it."""
    manifest = _read_manifest(checkpoint)
    for name, size in manifest["files"].items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"{file} {state}; remove {checkpoint} to continue from the checkpoint before it")
    if manifest["world_size"] != ranks:
        raise CheckpointError(
            f"{checkpoint} was written by {manifest['world_size']} ranks and this job has {ranks}; "
            "start as many ranks as before, or use another run.dir"
        )


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest, with the number of ranks and the size of each file. Raises CheckpointError where it is something else."""
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        good = isinstance(manifest["world_size"], int) and all(
            isinstance(size, int) and name.isprintable() and _is_inside(Path(name))
            for name, size in manifest["files"].items()
        )
        reason = "it is not what a checkpoint has"
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        good, reason = False, f"{type(error).__name__}: {str(error)[:100]}"
    if not good:
        raise CheckpointError(
            f"{path} is damaged ({reason}); remove {checkpoint} to continue from the checkpoint before it"
        )
    return manifest


def _is_inside(name: Path) -> bool:
    return not name.is_absolute() and all(part != ".." and len(part.encode()) < 256 for part in name.parts)
