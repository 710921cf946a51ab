"""``teacher.placement=cache``: what the teacher said is read from a folder, and there is no teacher.

A thread reads ahead of the micro-batch in training, at most ``teacher.queue`` micro-batches, so that the device does not wait for
the disk. Where the cache lacks a sequence, or a file has been damaged, the run is saved as it is before that step, and stops.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooSlow
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.config import ModelSpec, RunConfig
from distill.data.batch import TokenBatch
from distill.distributed import all_or_nothing, device
from distill.errors import CacheError, TeacherRankLost
from distill.models import check_tokenizers, load_tokenizer
from distill.teachers.cache.checks import folder_of
from distill.teachers.cache.index import TOKENIZER
from distill.teachers.cache.keys import Keys, batch_keys
from distill.teachers.cache.reader import CacheReader
from distill.teachers.signals import Head, Signal
from distill.teachers.wire import from_tensors


@dataclass(slots=True)
class _Asked:
    """A micro-batch, the sequences that it needs, and its reading once that has begun."""

    batch: TokenBatch
    wanted: list[tuple[bytes, int]]
    problem: str | None
    reading: Future[tuple[dict[str, Tensor], float]] | None = None


class Cached:
    """A ``Scorer`` that reads. What it lacks, or cannot read, is an error of the step that needs it, on all ranks together."""

    ahead = may_be_lost = True

    def __init__(self, reader: CacheReader, target: torch.device, ahead: int, deadline_s: float) -> None:
        """``ahead``: micro-batches that are read before they are taken; ``deadline_s``: for the disk to give one."""
        self._reader, self._device, self._ahead, self._deadline_s = reader, target, ahead, deadline_s
        contents = reader.index.contents
        self._head = _moved(reader.head(), target) if contents.signal == "hidden" else None
        self._asked: deque[_Asked] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-cache")
        self._bytes = self._wait_s = self._read_s = 0.0

    def submit(self, batches: Sequence[TokenBatch]) -> None:
        for batch in batches:
            keys = batch_keys(batch)
            self._asked.append(_Asked(batch, [key for key in keys if key is not None], self._missing(batch, keys)))
        self._read_on()

    def take(self, batch: TokenBatch) -> Signal:
        """Raises TeacherRankLost where the cache lacks a sequence, or has it no more as it was written."""
        began = time.perf_counter()
        oldest = self._asked.popleft()
        assert oldest.batch is batch, "signals are taken in the order in which they were asked for"
        self._read_on()
        tensors, seconds = self._answer(oldest)
        contents = self._reader.index.contents
        self._bytes += float(sum(tensor.nbytes for tensor in tensors.values()))
        self._read_s += seconds
        moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in tensors.items()}
        signal = from_tensors(contents.signal, moved, self._head)
        self._wait_s += time.perf_counter() - began
        return signal

    def figures(self) -> dict[str, float]:
        """``bytes`` read; ``read_s`` of the reading thread, ``wait_s`` of the training."""
        found = {"bytes": self._bytes, "read_s": self._read_s, "wait_s": self._wait_s}
        self._bytes = self._wait_s = self._read_s = 0.0
        return found

    def cancel(self) -> None:
        for asked in self._asked:
            if asked.reading is not None:
                asked.reading.cancel()
        self._asked.clear()

    def recover(self) -> bool:
        return False

    def close(self) -> None:
        self.cancel()
        self._thread.shutdown()
        self._reader.close()

    def _missing(self, batch: TokenBatch, keys: Keys) -> str | None:
        """What to say of the first of a batch's sequences that is not there."""
        found = [
            example
            for example, key in zip(batch.example_ids, keys, strict=True)
            if key is not None and key[0] not in self._reader
        ]
        if not found:
            return None
        others = f" (nor are {len(found) - 1} others of this micro-batch)" if len(found) > 1 else ""
        return (
            f"example {found[0]} is not in teacher.cache={self._reader.folder} as this run reads it{others}; add it, with this "
            f"run's data, tokenizer and train.max_length: {self._reader.index.command}"
        )

    def _read_on(self) -> None:
        for asked in list(self._asked)[: self._ahead]:
            if asked.reading is None and asked.problem is None:
                asked.reading = self._thread.submit(self._read, asked.wanted)

    def _answer(self, asked: _Asked) -> tuple[dict[str, Tensor], float]:
        if asked.problem is not None:
            raise TeacherRankLost(asked.problem)
        assert asked.reading is not None
        try:
            return asked.reading.result(self._deadline_s)
        except CacheError as error:
            raise TeacherRankLost(str(error)) from None
        except TooSlow:
            raise TeacherRankLost(
                f"teacher.cache={self._reader.folder}: nothing could be read within {self._deadline_s:g} s (comm.timeout_s); see "
                "whether its disk is still there"
            ) from None

    def _read(self, wanted: list[tuple[bytes, int]]) -> tuple[dict[str, Tensor], float]:
        began = time.perf_counter()
        tensors = self._reader.read(wanted, pinned=self._device.type == "cuda")
        return tensors, time.perf_counter() - began


def open_cached(config: RunConfig, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> Cached:
    """The cache ``teacher.cache``, or of the teacher ``name`` of several: the folder NAME in it. All ranks call it together.

    Raises CacheError for a cache that is damaged or does not fit the run, ModelError for one of other tokens.
    """
    folder = folder_of(config.teacher, name)
    with all_or_nothing(CacheError):
        reader = CacheReader(folder)
        check_tokenizers(
            tokenizer, load_tokenizer(ModelSpec(path=str(folder / TOKENIZER)), "teacher"), "cache's teacher"
        )
    return Cached(reader, device(), config.teacher.queue, config.comm.timeout_s)


def _moved(head: Head, target: torch.device) -> Head:
    bias = None if head.bias is None else head.bias.to(target)
    return Head(head.weight.to(target), bias, head.scale, head.softcap)
