"""Kills ranks while they save, and looks whether a complete checkpoint is always there: ``python -m distill.bench.checkpoints``.

    python -m distill.bench.checkpoints --kills 200 --json checkpoints.json      # kill -9 at random instants of saving
    python -m distill.bench.checkpoints --kills 0 --full-disks 20                # a disk that is full in the middle (root)

Ranks train a tiny model with DeepSpeed and save after every step, through the trainer's own `Checkpoints`. Each life begins
with loading the newest checkpoint; its weights must be, to the bit, what any life had at that step, which they can be only
if the optimizer's state came back whole as well. Ranks are forks of one process that has imported everything.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (seconds of imports that every fork would repeat)
import torch

from distill.checkpoint import Checkpoints
from distill.config import CommConfig, EngineConfig, TrainSection
from distill.data import char_tokenizer
from distill.distributed import process_group, rank
from distill.engine import TrainEngine
from distill.errors import CheckpointError
from distill.models import build_model

_LIFE = 60.0  # seconds for a life to reach its first save
_ENDLESS = 1_000_000
_DISK = 64 << 20  # bytes of the disk that is to be full
_MODEL = {
    "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass
class Tally:
    """`kills` fell into a save, `between` beside one; `saves` were finished, `loads` were right."""

    kills: int = 0
    between: int = 0
    saves: int = 0
    loads: int = 0
    full_disks: int = 0
    failures: list[str] = field(default_factory=list)


class Training:
    """One rank's part in one life. `say` gets the events: load, save, saved, failed."""

    def __init__(self, folder: Path, stage: int, dtype: str, say: Callable[[dict[str, Any]], None]) -> None:
        torch.manual_seed(1)
        torch.set_num_threads(1)
        model = _model()
        ranks = int(os.environ["WORLD_SIZE"])
        train = TrainSection(steps=_ENDLESS, batch_size=ranks, micro_batch_size=1)
        self.engine = TrainEngine(model, EngineConfig(zero_stage=stage, dtype=dtype, schedule="constant"), train)
        self.checkpoints = Checkpoints(folder, keep=2)
        self.step, self.say = 0, say

    def load(self) -> None:
        newest = self.checkpoints.latest()
        if newest is not None:
            state, _ = self.checkpoints.load(self.engine, newest)
            self.step = state["step"]
            self.say({"event": "load", "step": self.step, "name": newest.name, "digest": self.digest()})

    def train(self) -> None:
        """One optimizer step, the same whoever takes it."""
        self.step += 1
        weights = [p for p in self.engine.student.parameters() if p.requires_grad]
        loss = sum((p.float() * (((7 * self.step + i) % 5) - 2.1)).sum() for i, p in enumerate(weights))
        assert isinstance(loss, torch.Tensor)
        self.engine.backward(loss / 1000)
        self.engine.step()

    def save(self) -> None:
        self.say({"event": "save", "step": self.step, "digest": self.digest()})
        self.checkpoints.save(self.engine, self.step, {"step": self.step}, {"filler": torch.ones(10_000)})
        self.say({"event": "saved", "step": self.step})

    def digest(self) -> str:
        found = hashlib.blake2b(digest_size=8)
        for parameter in self.engine.student.parameters():
            found.update(parameter.detach().float().numpy().tobytes())
        return found.hexdigest()


def _model() -> torch.nn.Module:
    return build_model(dict(_MODEL), char_tokenizer("0123456789+-=\n#"), "sdpa")


def live(folder: Path, stage: int, dtype: str, say: Callable[[dict[str, Any]], None]) -> None:
    """Loads, then trains and saves for ever."""
    with process_group(CommConfig(timeout_s=20)):
        training = Training(folder, stage, dtype, say)
        training.load()
        while True:
            training.train()
            training.save()


def fill(folder: Path, stage: int, dtype: str, say: Callable[[dict[str, Any]], None], times: int, seed: int) -> None:
    """Saves `times` on a disk that has too little room, at a random size, and once more when there is room again."""
    draw, filler = random.Random(seed), folder / "filler"
    with process_group(CommConfig(timeout_s=20)):
        training = Training(folder / "checkpoints", stage, dtype, say)
        training.train()
        training.save()
        files = (folder / "checkpoints" / f"step_{training.step:08d}").rglob("*")
        size = sum(file.stat().st_size for file in files)
        for _ in range(times):
            training.train()
            room = draw.randrange(size)
            if rank() == 0:
                _take_all_but(folder, filler, room)
            try:
                training.save()
                say({"event": "failed", "reason": f"a save of {size} bytes passed with room for {room}"})
            except CheckpointError as error:
                say({"event": "full", "reason": str(error)})
            filler.unlink(missing_ok=True)
            training.load()
            training.train()
            training.save()


def _take_all_but(folder: Path, filler: Path, room: int) -> None:
    free = os.statvfs(folder)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - room, 1))


class Ranks:
    """The ranks of one life, and what rank 0 says."""

    def __init__(
        self, size: int, body: Callable[[Callable[[dict[str, Any]], None]], None], port: int, log: Path
    ) -> None:
        self._read, write = os.pipe()
        self._events = os.fdopen(self._read)
        self.pids = [_fork(rank, size, port, log, body, write) for rank in range(size)]
        os.close(write)

    def event(self, seconds: float) -> dict[str, Any] | None:
        """The next event; None when the ranks have ended, or nothing came in time."""
        if not select.select([self._read], [], [], seconds)[0]:
            return None
        line = self._events.readline()
        return json.loads(line) if line.endswith("\n") else None

    def kill(self, draw: random.Random) -> None:
        """SIGKILL to all, in any order, now and then with a moment between."""
        order = [*self.pids]
        draw.shuffle(order)
        for pid in order:
            os.kill(pid, signal.SIGKILL)
            if draw.random() < 0.3:
                time.sleep(draw.uniform(0, 0.02))
        self.wait()

    def wait(self) -> list[int]:
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    def close(self) -> list[dict[str, Any]]:
        """The events that nobody has read."""
        rest = [json.loads(line) for line in self._events if line.endswith("\n")]
        self._events.close()
        return rest


def _fork(
    number: int, size: int, port: int, log: Path, body: Callable[[Callable[[dict[str, Any]], None]], None], write: int
) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with log.open("ab") as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
        pipe = os.fdopen(write, "w", buffering=1)
        body((lambda event: _say(pipe, event)) if number == 0 else (lambda _: None))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _say(pipe: IO[str], event: dict[str, Any]) -> None:
    pipe.write(json.dumps(event) + "\n")


class Bench:
    """See the module."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.draw, self.tally = random.Random(args.seed), Tally()
        self.digests: dict[int, str] = {}
        self._took = 0.1  # seconds of a save, as last seen
        self._port = 22000 + os.getpid() % 2000

    def kills(self) -> None:
        began = time.monotonic()
        while self.tally.kills < self.args.kills and len(self.tally.failures) < 5:
            self._one_life()
            if (self.tally.kills + self.tally.between) % 10 == 0:
                took, failures = time.monotonic() - began, len(self.tally.failures)
                _note(f"{self.tally.kills} of {self.args.kills} kills while saving, {took:.0f} s, {failures} failures")

    def full_disks(self) -> None:
        disk = self.folder / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(disk)], check=True)
        try:
            (disk / "checkpoints").mkdir()
            body = lambda say: fill(disk, self.args.stage, self.args.dtype, say, self.args.full_disks, self.args.seed)  # noqa: E731
            ranks = self._ranks(body)
            while (event := ranks.event(_LIFE)) is not None:
                self._hear(event)
            statuses = ranks.wait()
            if any(statuses):
                self._fail(f"the ranks ended with {statuses} on a full disk")
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def _ranks(self, body: Callable[[Callable[[dict[str, Any]], None]], None]) -> Ranks:
        self._port += 1
        return Ranks(self.args.ranks, body, self._port, self.folder / "log")

    def _one_life(self) -> None:
        """Starts the ranks, lets them save a few times, and kills them at a random instant of the next save."""
        checkpoints = self.folder / "checkpoints"
        ranks = self._ranks(lambda say: live(checkpoints, self.args.stage, self.args.dtype, say))
        wanted, seen, began = self.draw.randint(1, 3), 0, 0.0
        while seen < wanted:
            event = ranks.event(_LIFE)
            if event is None:
                self._fail("the ranks did not come to their next save")
                ranks.kill(self.draw)
                ranks.close()
                return
            self._hear(event)
            if event["event"] == "save":
                seen, began = seen + 1, time.monotonic()
            elif event["event"] == "saved":
                self._took = time.monotonic() - began
        time.sleep(self.draw.uniform(0, self._took))
        ranks.kill(self.draw)
        last = "save"
        for event in ranks.close():
            self._hear(event)
            last = event["event"]
        if last == "save":
            self.tally.kills += 1
        else:
            self.tally.between += 1
        self._look(checkpoints)

    def _hear(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "failed":
            self._fail(event["reason"])
        elif kind == "full":
            self.tally.full_disks += 1
        elif kind == "saved":
            self.tally.saves += 1
        elif self.digests.setdefault(event["step"], event["digest"]) != event["digest"]:
            self._fail(f"{kind} of step {event['step']}: other weights than before")
        elif kind == "load":
            self.tally.loads += 1
            if event["name"] != f"step_{event['step']:08d}":
                self._fail(f"{event['name']} holds step {event['step']}")

    def _look(self, checkpoints: Path) -> None:
        """After a save has ever been finished there is always a checkpoint under its final name."""
        if self.tally.saves and not list(checkpoints.glob("step_*/manifest.json")):
            self._fail("no checkpoint is left")

    def _fail(self, reason: str) -> None:
        log = self.folder / "log"
        tail = log.read_text(errors="replace").splitlines()[-3:] if log.exists() else []
        self.tally.failures.append(reason)
        _note(f"FAILURE: {reason}\n  " + "\n  ".join(tail))


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Runs what was asked for; exit status 1 when a checkpoint was lost or wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="that fall into a save (default 200)")
    parser.add_argument("--full-disks", type=int, default=0, metavar="N", help="saves on a full tmpfs (needs root)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2), help="ZeRO stage (default 2)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="distill-checkpoints-"))
    bench = Bench(args, folder)
    _model()  # what transformers imports on first use, once for all forks
    began = time.monotonic()
    try:
        if args.kills:
            bench.kills()
        if args.full_disks:
            bench.full_disks()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record = {**vars(bench.tally), "ranks": args.ranks, "stage": args.stage, "dtype": args.dtype}
    record["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(record, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if bench.tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
