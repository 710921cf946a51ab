"""A cache's folder while it is filled: entered, repaired and listed by rank 0, written by every rank.

    folder = CacheFolder(path); folder.enter(contents, …); folder.repair()      rank 0
    writer = PartWriter(path, rank, index.contents)                             every rank: its own shards
    writer.add(key, tensors); shards = writer.finish()
    folder.publish([…all ranks' shards])                                        rank 0

``repair`` brings the folder into order after a kill, a full disk or a damaged file. What is not whole is named and removed, so
that the run which fills the cache finds it missing and makes it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.data.batch import TokenBatch
from distill.errors import CacheError, ConfigError, DataError
from distill.runs import claim, replace_folder, sync_folder
from distill.teachers.cache.index import HEAD, INDEX, SHARDS, TOKENIZER, Contents, Index, contents_of, read_index
from distill.teachers.cache.keys import batch_keys
from distill.teachers.cache.layout import MAX_RECORDS, SHARD_BYTES, read_contents
from distill.teachers.cache.repair import adopt, recover, remove, verify
from distill.teachers.cache.shard import Shard, ShardWriter, journal_of, refuse
from distill.teachers.signals import Head, Signal
from distill.teachers.wire import to_tensors


@dataclass
class CacheFolder:
    """For one process at a time. ``note`` is called with a line about everything that is found damaged."""

    path: Path
    note: Callable[[str], None]
    _lock: TextIO | None = None
    _index: Index | None = None
    _problems: list[str] = field(default_factory=list)

    @property
    def index(self) -> Index:
        assert self._index is not None
        return self._index

    def enter(self, contents: Contents, head: Head | None, tokenizer: PreTrainedTokenizerBase, command: str) -> None:
        """Claim the folder for these contents; creates what is not there.

        Raises ConfigError where another job writes to it, CacheError where it holds another teacher's scores or cannot be written.
        """
        try:
            (self.path / SHARDS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"teacher.cache={self.path} cannot be written: {error.strerror}; choose another folder"
            ) from None
        self._lock = claim(self.path, "teacher.cache")
        before = self._before()
        if before is not None:
            contents.check_same(before.contents, self.path / INDEX)
            contents = before.contents
        else:
            self._check_orphans(contents)
        self._index = Index(contents, () if before is None else before.shards, command)
        self._write_teacher(head, tokenizer)
        self.index.write(self.path)

    def repair(self) -> None:
        """Seal and list what a killed run has left, and shards that a lost index knew."""
        known = {shard.file for shard in self.index.shards}
        files = {path.with_suffix(".safetensors") for path in (self.path / SHARDS).iterdir()}
        found = list(self.index.shards)
        for path in sorted(files):
            if path.name in known:
                journal_of(path).unlink(missing_ok=True)
                continue
            shard = self._left(path)
            if shard is not None:
                found.append(shard)
        if len(found) > len(known):
            self.publish(found)

    def damage(self, shard: Shard) -> str | None:
        """What is wrong with a listed shard; None: its bytes are what was written. Reads all of it."""
        return verify(self.path / SHARDS / shard.file, shard)

    def drop(self, damaged: list[tuple[Shard, str]]) -> None:
        """Name and remove shards; the index goes first."""
        gone = {shard.file for shard, _ in damaged}
        if not gone:
            return
        self.publish([shard for shard in self.index.shards if shard.file not in gone])
        for shard, reason in damaged:
            path = self.path / SHARDS / shard.file
            self.note(f"{path} {reason}; its {shard.sequences} sequences ({shard.tokens} tokens) are scored again")
            remove(path)

    def publish(self, shards: Iterable[Shard]) -> None:
        """Make the index list exactly these shards, all of them complete."""
        self._index = replace(self.index, shards=tuple(sorted(shards, key=lambda shard: shard.file)))
        sync_folder(self.path / SHARDS)
        self.index.write(self.path)
        for shard in self.index.shards:
            journal_of(self.path / SHARDS / shard.file).unlink(missing_ok=True)

    def leave(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _before(self) -> Index | None:
        """The index that is there; None where there is none, or a damaged one (its shards are then looked at one by one)."""
        if not (self.path / INDEX).exists():
            return None
        try:
            return read_index(self.path)
        except CacheError as error:
            self.note(f"{str(error).partition(';')[0]}; it is made anew from the shards")
            return None

    def _check_orphans(self, contents: Contents) -> None:
        """Shards without an index must be of these contents: another cache's are not to be mixed with, nor removed."""
        for path in sorted((self.path / SHARDS).glob("*.safetensors")):
            with suppress(ValueError, OSError):
                contents.check_same(contents_of(json.loads(read_contents(path))), path)

    def _write_teacher(self, head: Head | None, tokenizer: PreTrainedTokenizerBase) -> None:
        try:
            if head is not None:
                partial = self.path / f".{HEAD}.partial"
                partial.write_bytes(head_bytes(head))
                partial.replace(self.path / HEAD)
            if not (self.path / TOKENIZER).is_dir():
                tokenizer.save_pretrained(str(self.path / f".{TOKENIZER}.partial"))
                replace_folder(self.path / f".{TOKENIZER}.partial", self.path / TOKENIZER)
        except OSError as error:
            refuse(self.path, error)

    def _left(self, path: Path) -> Shard | None:
        """A shard that the index does not list; None where nothing of it is left."""
        try:
            if path.exists() and not journal_of(path).exists():
                return adopt(path, self.index.contents.layout, self._check_contents(path))
            return recover(path, self.index.contents.layout, self.index.contents.json())
        except (ValueError, OSError) as error:
            self.note(f"{path}: {error}; its sequences are scored again")
            remove(path)
            return None

    def _check_contents(self, path: Path) -> Callable[[str], None]:
        return lambda text: self.index.contents.check_same(contents_of(json.loads(text)), path)


class PartWriter:
    """The shards that one rank writes, one after another. Nothing is listed before ``CacheFolder.publish``."""

    def __init__(self, path: Path, rank: int, contents: Contents, limit: int = SHARD_BYTES) -> None:
        """``limit``: bytes of data after which a shard is sealed."""
        self._folder, self._contents, self._limit = path / SHARDS, contents, limit
        self._prefix = f"rank_{rank:05d}_"
        taken = [int(file.stem[-6:]) for file in self._folder.glob(f"{self._prefix}{'[0-9]' * 6}.*")]
        self._next = max(taken, default=-1) + 1
        self._open: ShardWriter | None = None
        self._sealed: list[Shard] = []
        self._keys: set[bytes] = set()  # of the open shard

    def add(self, key: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Append one sequence's tensors (on the CPU), unless the shard has it. Raises CacheError on a full disk."""
        if key in self._keys:
            return
        if self._open is None:
            path = self._folder / f"{self._prefix}{self._next:06d}.safetensors"
            self._open, self._next = ShardWriter(path, self._contents.layout, self._contents.json()), self._next + 1
        self._open.add(key, tensors)
        self._keys.add(key)
        if self._open.data_bytes >= self._limit or len(self._open.records) >= MAX_RECORDS:
            self._seal()

    def add_batch(self, batch: TokenBatch, signal: Signal) -> tuple[int, int]:
        """Append what the teacher said of each of a batch's sequences; returns tokens and bytes.

        Raises DataError naming the example where that is not a number, CacheError on a full disk.
        """
        tensors = {name: tensor.cpu() for name, tensor in to_tensors(signal, self._contents.dtype).items()}
        begin = written = 0
        for example, found in zip(batch.example_ids, batch_keys(batch), strict=True):
            if found is None:
                continue
            key, tokens = found
            own = {name: tensor[begin : begin + tokens] for name, tensor in tensors.items()}
            if not all(bool((tensor.float() < torch.inf).all()) for tensor in own.values()):
                raise DataError(
                    f"example {example}: what the teacher says is not a number (teacher.signal={self._contents.signal} in "
                    f"{self._contents.wire}); leave it out of the data, or set model.teacher_dtype=float32 teacher.wire=float32"
                )
            self.add(key, own)
            begin, written = begin + tokens, written + sum(tensor.nbytes for tensor in own.values())
        return begin, written

    def finish(self) -> list[Shard]:
        """Seal what is open; all shards that this writer has made."""
        self._seal()
        return self._sealed

    def close(self) -> None:
        """Let go of what is open, after an error: it stays for the next run to recover."""
        if self._open is not None:
            self._open.close()

    def _seal(self) -> None:
        if self._open is not None:
            self._sealed.append(self._open.seal())
            self._open = None
            self._keys.clear()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what its ids mean."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def head_bytes(head: Head) -> bytes:
    """A head as a safetensors file: the same bytes for the same weights."""
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
