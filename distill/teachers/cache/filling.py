"""``distill rollout … --save``: whatever text a run trains on is scored by the teacher once, on all ranks, into a cache.

Each round, every rank makes the sequences of its share of the examples, all ranks learn all keys, and each scores those of its
own that are neither in the cache nor a lower rank's. So a text is scored once, after a kill only what is missing is, and
the number of ranks may differ from run to run. The examples are read as training reads them (``distill.samples``): the keys agree.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import RunConfig
from distill.data import CannotEncode, Example, Task, TooLong
from distill.data.batch import collate
from distill.data.tokenize import TokenSequence
from distill.distributed import (
    all_or_nothing,
    device,
    from_rank_0,
    gathered,
    raise_together,
    rank,
    total,
    world_size,
)
from distill.errors import CacheError, DataError, DistillError
from distill.methods import Method, Source
from distill.progress import StepProgress, say
from distill.samples import SampleSource, Wanted
from distill.teachers.cache.folder import CacheFolder, PartWriter, head_bytes, tokenizer_digest
from distill.teachers.cache.index import SHARDS, Contents, Index
from distill.teachers.cache.keys import batch_keys
from distill.teachers.cache.layout import read_header
from distill.teachers.frozen import FrozenModel, fingerprint
from distill.teachers.wire import wire_dtype

_ROUND = 16  # micro-batches per rank between two meetings of the ranks


class Texts(SampleSource):
    """The sequences of given examples, as a run that trains on their references makes them."""

    def sequences(self, examples: Sequence[Example]) -> list[TokenSequence]:
        """Raises DataError for an example that is too long or cannot be encoded, unless data.on_long=skip."""
        wanted = [Wanted(number, number, example, Source.REFERENCE) for number, example in enumerate(examples)]
        try:
            return [sequence.before_teacher() for sequence in self._make(wanted, None).sequences]
        except (TooLong, CannotEncode) as error:
            raise DataError(str(error)) from None


def fill(
    config: RunConfig,
    task: Task,
    count: int,
    method: Method,
    tokenizer: PreTrainedTokenizerBase,
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    command: str,
) -> dict[str, Any]:
    """Score the first ``count`` examples of ``task``; all ranks call it together. Returns figures of the cache and of this call.

    Raises ConfigError, CacheError or DataError on every rank; what has been scored by then is kept.
    """
    path, frozen = cache_path(config), FrozenModel(teacher[0])
    folder = CacheFolder(path, say)
    try:
        with all_or_nothing(CacheError):
            index = None
            if rank() == 0:
                contents = contents_for(config, frozen, teacher[1])
                folder.enter(contents, frozen.head if contents.signal == "hidden" else None, teacher[1], command)
                folder.repair()
                index = folder.index
        index = _checked(folder, from_rank_0(index))
        texts = Texts(config, task, tokenizer, method, teacher[0])
        run = _Filling(config, task, count, texts, frozen, index, path)
        shards = run.run()
        with all_or_nothing(CacheError):
            if rank() == 0:
                folder.publish([*index.shards, *shards])
                index = folder.index
        return run.figures(from_rank_0(index if rank() == 0 else None))
    finally:
        folder.leave()


def cache_path(config: RunConfig) -> Path:
    """``teacher.cache``, or else a folder in the run's."""
    return Path(config.teacher.cache or Path(config.run.dir) / "cache")


def contents_for(config: RunConfig, teacher: FrozenModel, tokenizer: PreTrainedTokenizerBase) -> Contents:
    """What a cache of this teacher's scores says of itself under ``config.teacher``."""
    section, head = config.teacher, teacher.head
    dense = section.signal in ("hidden", "logits")
    wire = wire_dtype(section.wire, head.weight.dtype) if dense else torch.float32
    vocabulary, hidden_size = head.weight.shape
    return Contents(
        teacher=str(config.model.teacher.path),
        fingerprint=fingerprint(teacher.model),
        tokenizer=tokenizer_digest(tokenizer),
        signal=section.signal,
        top_k=min(section.top_k, vocabulary) if section.signal == "topk" else 0,
        wire=str(wire).removeprefix("torch."),
        hidden_size=hidden_size,
        vocabulary=vocabulary,
        scale=float(head.scale),
        softcap=None if head.softcap is None else float(head.softcap),
        head=hashlib.sha256(head_bytes(head)).hexdigest() if section.signal == "hidden" else None,
    )


def _checked(folder: CacheFolder, index: Index) -> Index:
    """The index without the shards that are damaged; each rank reads its share of them."""
    mine, found = index.shards[rank() :: world_size()], []
    with StepProgress("check", len(mine), 0, max(len(mine) // 20, 1)) as progress:
        for number, shard in enumerate(mine, 1):
            reason = folder.damage(shard)
            found += [] if reason is None else [(shard, reason)]
            progress.update(number, {})
    bad = [pair for part in gathered(found) for pair in part]
    with all_or_nothing(CacheError):
        if rank() == 0:
            folder.drop(bad)
    return from_rank_0(folder.index if rank() == 0 else None)


class _Filling:
    """One call of ``fill`` on this rank."""

    def __init__(
        self, config: RunConfig, task: Task, count: int, texts: Texts, teacher: FrozenModel, index: Index, path: Path
    ) -> None:
        self.config, self.task, self.count, self.texts, self.teacher = config, task, count, texts, teacher
        self.path, self.contents = path, index.contents
        self.there = self._keys(index)
        self.writer = PartWriter(path, rank(), index.contents)
        self.tokens = self.bytes = self.skipped = self.found = 0
        self.seconds = 0.0
        pad = texts.tokenizer.pad_token_id
        assert isinstance(pad, int)
        self.pad = pad

    def run(self) -> list[Any]:
        """Score what is missing; all ranks' new shards."""
        size = _ROUND * self.config.train.micro_batch_size * world_size()
        with closing(self.writer), StepProgress("score", self.count, 0, max(self.count // 20, 1)) as progress:
            for start in range(0, self.count, size):
                stop = min(start + size, self.count)
                self._round(start, stop)
                progress.update(stop, {"tok/s": self.tokens * world_size() / max(self.seconds, 1e-9)})
            with all_or_nothing(CacheError):
                shards = self.writer.finish()
        return [shard for part in gathered(shards) for shard in part]

    def figures(self, index: Index) -> dict[str, Any]:
        """Of the whole cache, and of this call over all ranks."""
        tokens, written, skipped, found = total([float(n) for n in (self.tokens, self.bytes, self.skipped, self.found)])
        on_disk = sum(shard.bytes for shard in index.shards)
        figures = {
            "cache": str(self.path),
            "sequences": sum(shard.sequences for shard in index.shards),
            "tokens": index.tokens,
            "bytes_per_token": index.contents.token_bytes,
            "bytes_per_token_on_disk": round(on_disk / max(index.tokens, 1), 2),
            "scored_tokens": int(tokens),
            "scored_bytes": int(written),
            "there": int(found),
            "skipped": int(skipped),
            "tokens_per_s": round(tokens / max(self.seconds, 1e-9), 1),
        }
        if written != tokens * index.contents.token_bytes:
            raise CacheError(
                f"{self.path}: {written:.0f} bytes were written for {tokens:.0f} tokens of {index.contents.token_bytes}"
            )
        say(
            f"{figures['sequences']} sequences, {index.tokens} tokens of {figures['bytes_per_token']} bytes "
            f"({figures['bytes_per_token_on_disk']} on the disk): {self.path}"
        )
        return figures

    def _keys(self, index: Index) -> set[bytes]:
        """The keys of all sequences that the index lists."""
        with all_or_nothing(CacheError):
            layout = index.contents.layout
            return {
                record.key
                for shard in index.shards
                for record in read_header(layout, self.path / SHARDS / shard.file)[0]
            }

    def _round(self, start: int, stop: int) -> None:
        """Score the examples from ``start`` to ``stop``, each rank its share of them; ranks fail together."""
        began = time.perf_counter()
        share = range(
            start + (stop - start) * rank() // world_size(), start + (stop - start) * (rank() + 1) // world_size()
        )
        problem, sequences = None, []
        try:
            sequences = self.texts.sequences([self.task[index] for index in share])
        except DistillError as error:
            problem = str(error)
        raise_together(DataError, problem)
        self.skipped += len(share) - len(sequences)
        keys = [key and key[0] for key in batch_keys(collate(sequences, self.pad, None))]
        missing = self._missing(sequences, keys)
        try:
            self._score(missing)
        except (CacheError, DataError) as error:
            problem = str(error)
        raise_together(CacheError, problem)
        self.seconds += time.perf_counter() - began

    def _missing(self, sequences: list[TokenSequence], keys: list[bytes | None]) -> list[TokenSequence]:
        """Those of this rank's sequences that neither the cache nor a lower rank has; longest first, so that rows fill up."""
        parts = gathered(keys)
        for part in parts[: rank()]:
            self.there.update(key for key in part if key is not None)
        missing = []
        for sequence, key in zip(sequences, keys, strict=True):
            if key is None:
                self.skipped += 1
            elif key in self.there:
                self.found += 1
            else:
                missing.append(sequence)
                self.there.add(key)
        for part in parts[rank() :]:
            self.there.update(key for key in part if key is not None)
        return sorted(missing, key=lambda sequence: -len(sequence.ids))

    def _score(self, sequences: list[TokenSequence]) -> None:
        size, section = self.config.train.micro_batch_size, self.config.teacher
        for start in range(0, len(sequences), size):
            part = sequences[start : start + size]
            longest = max(len(sequence.ids) for sequence in part)
            batch = collate(part, self.pad, longest if self.config.train.pack else None).to(device())
            tokens, count = self.writer.add_batch(batch, self.teacher.signal(batch, section.signal, section.top_k))
            self.tokens, self.bytes = self.tokens + tokens, self.bytes + count
