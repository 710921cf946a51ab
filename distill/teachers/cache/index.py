"""What a cache holds: whose scores, of which kind, in which shards. One JSON file, replaced as a whole.

    CACHE/index.json          this
    CACHE/head.safetensors    the teacher's head (weight [V, H], bias [V]), for teacher.signal=hidden
    CACHE/tokenizer/          the teacher's tokenizer, for a student that is built from scratch
    CACHE/shards/             see ``layout`` and ``shard``

A shard is listed only when it is complete and on the disk, so what the index lists is there or has been damaged since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from distill.config import TeacherSection
from distill.errors import CacheError
from distill.runs import write_atomically
from distill.teachers.cache.layout import NAMES, Layout
from distill.teachers.cache.shard import Shard, refuse
from distill.teachers.frozen import close
from distill.teachers.signals import bytes_per_token
from distill.teachers.wire import tensor_shapes
from distill.wire import travels

INDEX, HEAD, TOKENIZER, SHARDS = "index.json", "head.safetensors", "tokenizer", "shards"
FORMAT = "distill teacher cache 1"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES if dtype.is_floating_point}


@travels
@dataclass(frozen=True)
class Contents:
    """Whose scores and in which form. All but ``teacher`` and the last digits of ``fingerprint`` must agree for one cache."""

    teacher: str  # where it was loaded from; for people
    fingerprint: list[float]  # of its parameters, see ``distill.teachers.frozen``
    tokenizer: str  # SHA-256 of its vocabulary
    signal: str
    top_k: int  # of signal=topk; else 0
    wire: str  # dtype of hidden states and logits; float32 for the others
    hidden_size: int
    vocabulary: int  # rows of the head
    scale: float  # of the logits, as Head has it
    softcap: float | None
    head: str | None = None  # SHA-256 of the head's file, for signal=hidden

    def __post_init__(self) -> None:
        numbers = (self.top_k, self.hidden_size, self.vocabulary)
        texts = (self.teacher, self.tokenizer, self.signal, self.wire)
        pair = isinstance(self.fingerprint, list) and len(self.fingerprint) == 2
        good = (
            all(type(number) is int and 0 <= number < 1 << 40 for number in numbers)
            and all(isinstance(text, str) for text in texts)
            and pair
            and all(isinstance(value, int | float) for value in [*self.fingerprint, self.scale, self.softcap or 0.0])
            and (self.head is None or isinstance(self.head, str))
            and self.signal in ("logits", "hidden", "topk", "sampled")
            and self.wire in _DTYPES
        )
        if not good:
            raise ValueError(f"{asdict(self)} is not what a cache contains")

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.wire]

    @property
    def layout(self) -> Layout:
        return Layout(tensor_shapes(self.signal, self.dtype, self.hidden_size, self.vocabulary, self.top_k))

    @property
    def token_bytes(self) -> int:
        """The arithmetic: what one position costs."""
        return bytes_per_token(self.signal, self.dtype, self.hidden_size, self.vocabulary, self.top_k)

    def json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def check_same(self, other: Contents, where: Path) -> None:
        """Raise CacheError naming the first value in which ``other``, of the file ``where``, differs."""
        ours, theirs = asdict(self), asdict(other)
        for name, key in _KEYS.items():
            same = close(ours[name], theirs[name]) if name == "fingerprint" else ours[name] == theirs[name]
            if not same:
                raise CacheError(
                    f"{where} holds {name}={theirs[name]}, and this run would add {name}={ours[name]}; set {key} as it was, or "
                    "choose another teacher.cache"
                )

    def check_run(self, section: TeacherSection, where: Path) -> None:
        """Raise CacheError where a training run asks for something else than what is here."""
        asked: dict[str, tuple[Any, Any]] = {"teacher.signal": (section.signal, self.signal)}
        if self.signal == "topk":
            asked["teacher.top_k"] = (min(section.top_k, self.vocabulary), self.top_k)
        if self.signal in ("hidden", "logits") and section.wire != "auto":
            asked["teacher.wire"] = (section.wire, "float8" if self.dtype.itemsize == 1 else self.wire)
        for key, (wanted, found) in asked.items():
            if wanted != found:
                raise CacheError(
                    f"{key}={wanted} is not what {where} was made with; set {key}={found}, or make another cache: "
                    f"distill rollout … {key}={wanted} teacher.cache=FOLDER --save"
                )


_KEYS = {
    "signal": "teacher.signal",
    "top_k": "teacher.top_k",
    "wire": "teacher.wire",
    "vocabulary": "model.teacher.path",
    "hidden_size": "model.teacher.path",
    "scale": "model.teacher.path",
    "softcap": "model.teacher.path",
    "tokenizer": "model.teacher.path",
    "fingerprint": "model.teacher.path and model.teacher_dtype",
    "head": "model.teacher_dtype",
}


def contents_of(values: object) -> Contents:
    """From JSON's values. Raises ValueError."""
    if not isinstance(values, Mapping) or set(values) != {field.name for field in fields(Contents)}:
        raise ValueError("it does not say what the cache contains")
    return Contents(**values)


def check_shard(contents: Contents, text: str) -> None:
    """Raises ValueError unless a shard says of itself, in ``text``, what its cache's index says."""
    try:
        contents.check_same(contents_of(json.loads(text)), Path(INDEX))
    except (CacheError, TypeError, RecursionError):
        raise ValueError("it belongs to another cache") from None


@travels
@dataclass(frozen=True)
class Index:
    """``command`` is that of the last run that added to it."""

    contents: Contents
    shards: tuple[Shard, ...] = ()
    command: str = "distill rollout … --save"

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Raises CacheError on a full disk; the index that was there stays."""
        path = folder / INDEX
        values: dict[str, Any] = {"format": FORMAT, "contents": asdict(self.contents), "command": self.command}
        values |= {"shards": [asdict(shard) for shard in self.shards]}
        try:
            write_atomically(path, json.dumps(values, indent=1) + "\n")
        except OSError as error:
            path.with_name(f".{path.name}.partial").unlink(missing_ok=True)
            refuse(path, error)


def read_index(folder: Path) -> Index:
    """Raises CacheError where there is none or it is damaged."""
    path = folder / INDEX
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {str(values['format'])[:50]!r}, not {FORMAT!r}")
        shards = tuple(_shard(entry) for entry in values["shards"])
        if len({shard.file for shard in shards}) < len(shards):
            raise ValueError("it lists a shard twice")
        return Index(contents_of(values["contents"]), shards, str(values["command"]))
    except FileNotFoundError:
        raise CacheError(
            f"teacher.cache={folder} holds no index.json; fill it: distill rollout … teacher.cache={folder} --save"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(
            f"{path} is damaged ({type(error).__name__}: {str(error)[:150]}); run distill rollout … --save again, which makes it "
            "anew from the shards"
        ) from None


def _shard(values: dict[str, Any]) -> Shard:
    shard = Shard(**values)
    plain = isinstance(shard.file, str) and shard.file.isprintable() and Path(shard.file).name == shard.file
    numbers = (shard.bytes, shard.sequences, shard.tokens)
    if not plain or not shard.file.endswith(".safetensors") or not isinstance(shard.sha256, str):
        raise ValueError(f"{str(shard.file)[:80]!r} is not a shard")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{shard.file}: sizes must be whole numbers")
    return shard
