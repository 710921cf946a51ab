"""Every placement of a teacher as the contract's tests open it: one function each, from a teacher on disk to a ``Scorer``.

A new placement is one more function here; ``test_contract`` then asks of it what the trainer relies on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from harness import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config import TeacherSection, TeacherServerSpec
from distill.data import char_tokenizer
from distill.data.batch import TokenBatch
from distill.teachers.base import Scorer
from distill.teachers.cache.filling import contents_for
from distill.teachers.cache.folder import CacheFolder, PartWriter
from distill.teachers.cache.reader import CacheReader
from distill.teachers.cache.scorer import Cached
from distill.teachers.colocated import Colocated
from distill.teachers.frozen import FrozenModel, fingerprint
from distill.teachers.mixture import Mixed
from distill.teachers.routing import Routed
from distill.teachers.server import open_server
from distill.teachers.server.scorer import ServerScorer

VllmStub = load(Path(__file__).parents[1] / "rollouts" / "vllm_stub.py", "vllm_stub").VllmStub


@dataclass(frozen=True)
class Case:
    """A teacher, and what is asked of it."""

    teacher: Path  # a folder with a model (no tokenizer)
    kind: str
    top_k: int
    batches: Sequence[TokenBatch]  # all that will be asked
    folder: Path  # to write into


def teacher_of(case: Case) -> FrozenModel:
    """The teacher in process: what every placement is compared with."""
    return FrozenModel(AutoModelForCausalLM.from_pretrained(case.teacher))


@contextmanager
def colocated(case: Case) -> Iterator[Scorer]:
    scorer = Colocated(teacher_of(case), case.kind, case.top_k)
    yield scorer
    scorer.close()


@contextmanager
def server(case: Case) -> Iterator[Scorer]:
    with VllmStub(teacher_of(case).model, max_logprobs=32) as stub:
        scorer = open_stub([stub.url], case.teacher, case.kind, case.top_k)
        yield scorer
        scorer.close()


def open_stub(
    urls: Sequence[str],
    folder: Path,
    kind: str,
    top_k: int,
    queue: int = 2,
    timeout_s: float = 600.0,
    run: str | Path = "/nowhere",
    **spec: Any,
) -> ServerScorer:
    """A scorer for the model in ``folder``, which its ``outline`` stands for here."""
    spec = {"concurrency": 3, "request_s": 10.0, "retry_s": 0.05, "pause_s": 20.0} | spec
    section = TeacherSection(
        placement="server", signal=kind, top_k=top_k, queue=queue, server=TeacherServerSpec(url=list(urls), **spec)
    )
    config = SimpleNamespace(
        teacher=section,
        train=SimpleNamespace(max_length=64),
        comm=SimpleNamespace(timeout_s=timeout_s),
        run=SimpleNamespace(dir=str(run)),
        model=SimpleNamespace(teacher=SimpleNamespace(path=str(folder))),
    )
    parts = SimpleNamespace(
        tokenizer=AutoTokenizer.from_pretrained(folder), teacher=AutoModelForCausalLM.from_pretrained(folder)
    )
    return open_server(config, parts)  # type: ignore[arg-type]


@contextmanager
def cache(case: Case) -> Iterator[Scorer]:
    fill_cache(case.folder / "cache", teacher_of(case), case.kind, case.top_k, case.batches)
    scorer = Cached(CacheReader(case.folder / "cache"), torch.device("cpu"), 2, 60.0)
    yield scorer
    scorer.close()


def fill_cache(
    path: Path, teacher: FrozenModel, kind: str, top_k: int, batches: Sequence[TokenBatch], wire: str = "auto"
) -> list[str]:
    """A cache of what the teacher says of these batches; returns what was found damaged in the folder."""
    section = TeacherSection(signal=kind, top_k=top_k, wire=wire, cache=str(path))
    config = SimpleNamespace(teacher=section, model=SimpleNamespace(teacher=SimpleNamespace(path="teacher")))
    tokenizer = char_tokenizer("0123456789+-=\n#")
    contents, notes = contents_for(config, teacher, tokenizer), []  # type: ignore[arg-type]
    folder = CacheFolder(path, notes.append)
    folder.enter(contents, teacher.head if kind == "hidden" else None, tokenizer, "distill rollout --save")
    folder.repair()
    writer = PartWriter(path, 0, folder.index.contents)
    for batch in batches:
        writer.add_batch(batch, teacher.signal(batch, kind, top_k))
    folder.publish([*folder.index.shards, *writer.finish()])
    folder.leave()
    return notes


@contextmanager
def separate(case: Case) -> Iterator[Scorer]:
    """A student and two teacher ranks as threads: a bridge needs no process of its own, and no default group."""
    from distill.config import ModelSpec
    from distill.teachers.separate.bridge import Bridge, Seats
    from distill.teachers.separate.services import Service
    from distill.teachers.separate.serving import Server
    from distill.teachers.separate.student import Client, Separate

    teacher, store, here = teacher_of(case), dist.HashStore(), torch.device("cpu")
    head = teacher.head
    sizes = {"hidden_size": head.weight.shape[1], "vocabulary": head.weight.shape[0]}
    prints = tuple(fingerprint(teacher.model))
    service = Service(0, "teacher", ModelSpec(), (1, 2), case.kind, case.top_k, fingerprint=prints, **sizes)

    def bridge(me: int) -> Bridge:
        return Bridge("gloo", store, Seats((0, 1, 2), 1, me), True, 30.0, here, 0)

    def serve(me: int) -> int:
        return Server(bridge(me), {0: service}, {0: teacher}).run()

    with ThreadPoolExecutor(2) as ranks:
        serving = [ranks.submit(serve, me) for me in (1, 2)]
        client = Client(bridge(0), "stop")
        scorer = Separate(client, service, head, 2)
        yield scorer
        scorer.cancel()
        client.end(75)
        assert [future.result(30) for future in serving] == [75, 75]


@contextmanager
def routed(case: Case) -> Iterator[Scorer]:
    """The teacher twice, each for half of the sequences."""
    halves = {name: Colocated(teacher_of(case), case.kind, case.top_k) for name in ("even", "odd")}
    with closing(Routed(halves)) as scorer:
        yield scorer


@contextmanager
def mixed(case: Case) -> Iterator[Scorer]:
    """The teacher's mean with itself."""
    both = {name: Colocated(teacher_of(case), case.kind, case.top_k) for name in ("a", "b")}
    with closing(Mixed(both, {"a": 0.3, "b": 0.7})) as scorer:
        yield scorer


@dataclass(frozen=True)
class Placement:
    open: Callable[[Case], AbstractContextManager[Scorer]]
    signals: tuple[str, ...] = ("logits", "hidden", "topk", "sampled")
    tolerance: float = 0.0  # of log-probabilities, logits and hidden states; say why where it is not 0
    normalised: bool = False  # its logits are log-probabilities


PLACEMENTS = {
    "routed": Placement(routed, tolerance=1e-5),  # each half is laid out anew
    # hidden states of several teachers come as logits, and lists of k ids as longer ones: see test_mixture
    "mixed": Placement(mixed, ("logits", "sampled"), 1e-5, normalised=True),
    "colocated": Placement(colocated),
    "cache": Placement(cache, tolerance=1e-5),  # a sequence is scored once, and asked about in two layouts
    "separate": Placement(separate, tolerance=1e-5),  # two ranks see half of the rows each
    # What a server sends reads back as the same bits; but it computes every sequence in a row of its own, and fp32 sums
    # of another shape round otherwise.
    "server": Placement(server, ("logits", "topk", "sampled"), 1e-5, normalised=True),
}
