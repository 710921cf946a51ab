"""The run folder: one place per run, owned by one process group at a time.

DIR/config.yaml       the resolved configuration
DIR/metrics.jsonl     one flat JSON object per step (`area/name` keys)
DIR/tensorboard/      the same, as events
DIR/checkpoints/      step_00000100/ … (complete once they have that name)
DIR/final/            the student in Hugging Face format
DIR/curves.png        loss and accuracy over steps
DIR/summary.json      what came out
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from distill.config.checks import and_above
from distill.errors import CheckpointError, ConfigError

# Keys that may differ between a checkpoint and the run that continues it: they change no sample, loss or weight.
FREE_KEYS = (
    "run",
    "comm",
    "checkpoint",
    "engine.replicas",
    "train.log_every",
    "data.path",
    "model.student.path",
    "model.teacher.path",
    "rollout.slots",
    "rollout.samples",
    "rollout.examples",
    "rollout.vllm",
    "teacher.server",
    "teacher.queue",
)


class RunFolder:
    """Paths of one run, and the rules for entering it."""

    def __init__(self, path: str | Path, replica: int | None = None) -> None:
        """``replica``: of a run that several jobs share, each with a folder of its own in it."""
        self.path = Path(path)
        self.replica = self.path if replica is None else self.path / "replicas" / str(replica)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.curves = self.path / "curves.png"
        self.summary = self.path / "summary.json"
        self._lock: TextIO | None = None

    def enter(self, resolved: Mapping[str, Any], resume: str, defaults: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Claim the folder for this run (rank 0 only). Creates it, or checks that what is there may be continued.

        ``defaults``: the values of keys that a folder written before they existed does not hold.
        Raises ConfigError for a folder that cannot be written, is in use, or must (not) hold a run; CheckpointError
        where its checkpoint comes from another configuration.
        """
        started = self.config.exists()
        if started and resume == "never" and self.replica == self.path:
            raise ConfigError(f"run.dir={self.path} already holds a run; choose another folder or run.resume=auto")
        if not started and resume == "must":
            raise ConfigError(f"run.dir={self.path} holds no run to continue (run.resume=must)")
        if started:
            self._check_same(resolved, defaults)
        try:
            self.replica.mkdir(parents=True, exist_ok=True)
            self._claim()
            self.checkpoints.mkdir(exist_ok=True)
            with (self.path / ".entering").open("w") as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)  # replicas may come at the same moment
                if not self.config.exists():
                    write_atomically(self.config, yaml.safe_dump(dict(resolved), sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise ConfigError(
                f"run.dir={self.path} cannot be written: {error.strerror}; choose another run.dir"
            ) from None

    def _claim(self) -> None:
        """Hold a lock for the life of this process, so that two jobs never write into one run."""
        self._lock = claim(self.replica, "run.dir")

    def result(self) -> dict[str, Any] | None:
        """The summary of a run that is complete, or None."""
        try:
            return json.loads(self.summary.read_text(encoding="utf-8")) if self.summary.exists() else None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{self.summary} is damaged ({str(error)[:100]}); remove it to finish the run from its last checkpoint"
            ) from None

    def leave(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check_same(self, resolved: Mapping[str, Any], defaults: Callable[[], Mapping[str, Any]]) -> None:
        try:
            before = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise CheckpointError(
                f"{self.config} cannot be read ({error}); remove the folder or choose another run.dir"
            ) from None
        if not isinstance(before, dict):
            raise CheckpointError(f"{self.config} is not a configuration; remove the folder or choose another run.dir")
        changed = differing_keys(before, resolved, defaults)
        if changed:
            shown = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, old, new in changed[:4])
            raise CheckpointError(
                f"run.dir={self.path} was started with another configuration ({shown}); "
                "use the same values to continue it, or another run.dir"
            )


def claim(path: Path, key: str) -> TextIO:
    """A lock on a folder that exists, held until the file is closed or the process ends; ``key`` is its name in the configuration.

    Raises ConfigError where another process holds it.
    """
    lock = (path / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(f"{key}={path} is in use by another running job; choose another {key}") from None
    return lock


def differing_keys(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    defaults: Callable[[], Mapping[str, Any]] = dict,
    prefix: str = "",
) -> list[tuple[str, Any, Any]]:
    """``(key, old, new)`` of every value that differs, but for FREE_KEYS.

    A key that ``before`` lacks is of a version that did not know it, which did what the key's default does now: there is no
    difference where it has that. ``defaults`` is asked only then.
    """
    old, new = dict(_leaves(before, prefix)), dict(_leaves(now, prefix))
    unknown = {key for key in new if not any(above in old for above in and_above(key))}
    if unknown:
        default = dict(_leaves(defaults(), prefix))
        old |= {key: default.get(key) for key in unknown}
    return [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Every value under its full key, but for FREE_KEYS."""
    for key, value in values.items():
        full = f"{prefix}{key}"
        if full in FREE_KEYS:
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{full}.")
        else:
            yield full, value


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader, or a crash at any moment, sees the old file or the new one, never half."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def replace_folder(partial: Path, target: Path) -> None:
    """Give a complete folder its final name; an older one of that name goes away only then."""
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(target)
    sync_folder(target.parent)


def sync_folder(path: Path) -> None:
    """Make renames in ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
