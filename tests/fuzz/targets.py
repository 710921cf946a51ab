"""What is fuzzed: each reader of files or of text that people and other programs write, its valid seeds, and its own errors.

A reader may accept a case or refuse it with one of its errors; everything else is a defect of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seeds import dump

Read = Callable[[bytes, Path], object]


@dataclass(frozen=True)
class Target:
    """`share` is its part of all cases; `read` gets the case and an empty folder of its own."""

    name: str
    share: float
    seeds: list[bytes]
    read: Read
    errors: tuple[type[BaseException], ...]


def all_targets() -> list[Target]:
    """Every target; imports what they need."""
    return [
        *_plan_targets(),
        *_text_targets(),
        *_data_targets(),
        *_run_targets(),
        *_trace_targets(),
        *_elastic_targets(),
        *_cache_targets(),
    ]


def _file(name: str, read: Callable[[Path], object]) -> Read:
    def run(data: bytes, folder: Path) -> object:
        path = folder / name
        path.write_bytes(data)
        return read(path)

    return run


def _text(read: Callable[[str], object]) -> Read:
    return lambda data, folder: read(data.decode("utf-8", "surrogateescape"))


def _plan_targets() -> list[Target]:
    from ncclx_py.plans.algorithms.registry import ALGORITHMS, build
    from ncclx_py.plans.errors import PlanFileError
    from ncclx_py.plans.files import plan_to_json, read_plan
    from ncclx_py.plans.problems import uniform
    from ncclx_py.plans.rules import forced_rules, read_rules
    from ncclx_py.plans.spec import resolve
    from ncclx_py.plans.spec_file import read_spec, write_spec
    from ncclx_py.plans.table import Corrections, Row, Table, read_table, signature
    from ncclx_py.plans.topology import Topology

    topology = Topology((0, 0, 1, 1))
    plans = [
        plan_to_json(build(uniform(collective, 4, size, 4), topology, algorithm, {})).encode()
        for collective, algorithm, size in (
            ("all_reduce", "ring", 64), ("all_to_all", "pairwise", 64), ("broadcast", "tree", 32), ("all_gather", "ring", 16),
        )
        if algorithm in ALGORITHMS[collective]
    ]  # fmt: skip
    toml = b'[[rule]]\ncollective = "all_reduce"\nbytes_per_rank = "[0, 8KiB)"\nlevel = "both"\nhosts = "[2, 8]"\n'
    toml += b'ranks_per_host = 2\nalgorithm = "ring"\n[[rule]]\ncollective = "broadcast"\nalgorithm = "chain"\n'
    toml += b"parameters = { chunks = 8 }\n"
    csv = b'collective,bytes_per_rank,algorithm,parameters\nall_reduce,"[1MiB, *)",pipelined,chunks=8\nbroadcast,*,chain,\n'
    rows = [Row("all_reduce", 4096 << i, signature(topology), "ring", {}, 1e-3 * (i + 1), True) for i in range(3)]
    table = (
        Table((*rows, Row("broadcast", 64, "hosts 1, rails 1", "chain", {"chunks": 4}, 0.1, False))).to_json().encode()
    )
    spec = b'hosts = 2\nranks_per_host = [2, 2]\nplacement = "cyclic"\nrails = 2\n[intra]\nalpha = "5us"\nbandwidth = "8GB/s"\n'
    spec += b'memory = "20GB/s"\nreduction = "1GB/s"\n[inter]\nalpha = "50us"\nbandwidth = "200Mbit/s"\n'
    spec += b'[[nic]]\nhost = 1\nrail = 0\nbandwidth = "100Mbit/s"\n'
    rules = lambda path: [rule.fits(topology) or rule.check(topology) for rule in read_rules(path)]  # noqa: E731
    corrections = lambda path: Corrections(read_table(path), topology).ratio("all_reduce", "ring", {}, 5000)  # noqa: E731
    return [
        Target("plan", 0.12, plans, _file("plan.json", lambda path: read_plan(path, 4)), (PlanFileError,)),
        Target("rules-toml", 0.08, [toml], _file("rules.toml", rules), (ValueError,)),
        Target("rules-csv", 0.05, [csv], _file("rules.csv", rules), (ValueError,)),
        Target("algo", 0.05, [b"all_reduce=ring,broadcast=chain(chunks=4)"], _text(forced_rules), (ValueError,)),
        Target("table", 0.1, [table], _file("table.json", corrections), (ValueError,)),
        Target(
            "topology",
            0.1,
            [spec, write_spec(Topology((0, 0, 1), 2)).encode()],
            _file("topology.toml", lambda path: resolve((), 0, read_spec(path))),
            (ValueError,),
        ),
    ]


def _text_targets() -> list[Target]:
    from ncclx_py.launch.shape import Shape, parse_ranks, parse_rates

    from ncclx_py.environment import read_launch
    from ncclx_py.faults.spec import InjectError, parse_all
    from ncclx_py.runtime.settings import read_settings
    from ncclx_py.units import parse_bandwidth, parse_size, parse_time

    faults = [
        b"kill:rank=3,step=20", b"stop:rank=1,call=7,for=3;delay:rank=0,seconds=2,for=1.5", b"nan:rank=2,step=4,group=world",
        b"drop-link:host=1,rail=0,seconds=3,for=2;halve-rate:rank=3,call=9",
    ]  # fmt: skip

    def units(text: str) -> None:
        for parse in (parse_bandwidth, parse_size, parse_time):
            try:
                parse(text)
            except ValueError:
                continue

    def shape(text: str) -> object:
        ranks, _, rates = text.partition(" ")
        return Shape(parse_ranks(ranks), parse_rates(rates, None)).host_of

    def environment(text: str) -> object:
        env = dict(line.split("=", 1) for line in text.split("\n") if "=" in line)
        read_settings(env)
        return read_launch(env).host_of()

    slurm = b"SLURM_PROCID=3\nSLURM_NTASKS=8\nSLURM_LOCALID=1\nSLURM_JOB_NODELIST=n[1-2,07],gpu\nSLURM_TASKS_PER_NODE=2(x4)\n"
    slurm += b"SLURM_STEP_NUM_NODES=4\nSLURM_DISTRIBUTION=cyclic:block\n"
    torchrun = (
        b"RANK=1\nWORLD_SIZE=4\nLOCAL_RANK=1\nLOCAL_WORLD_SIZE=2\nMASTER_ADDR=h\nNCCLX_VERIFY=always\nNCCLX_LOG=1\n"
    )
    return [
        Target("inject", 0.08, faults, _text(parse_all), (InjectError,)),
        Target("units", 0.04, [b"5us", b"200Mbit/s", b"64MiB", b"1.5e3 GB/s"], _text(units), ()),
        Target("shape", 0.03, [b"4x2 200mbit", b"4+2 1gbit,100mbit"], _text(shape), (ValueError,)),
        Target("environment", 0.05, [slurm, torchrun], _text(environment), (ValueError,)),
    ]


def _data_targets() -> list[Target]:
    from distill.answers import extract_answer
    from distill.data.config import DataConfigError, Gsm8kConfig, JsonlConfig
    from distill.data.gsm8k import Gsm8k
    from distill.data.jsonl import Jsonl
    from distill.data.lines import BadLine, EmptyDataset

    lines = [
        {"prompt": "What is 6 times 7?", "response": "6 * 7 = 42\n#### 42", "answer": "42"},
        {"messages": [{"role": "user", "content": "6 times 7?"}, {"role": "assistant", "content": "\\boxed{42}"}]},
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "response": "é",
            "answer": 4.5,
        },
    ]
    jsonl = ("\n".join(map(json.dumps, lines)) + "\n").encode()
    question = {"question": "Half of 48?", "answer": "48/2 = <<48/2=24>>24\n#### 24"}
    gsm8k = ((json.dumps(question) + "\n") * 2).encode()

    def read_jsonl(path: Path) -> None:
        for on_bad in ("error", "skip"):
            try:
                task = Jsonl(JsonlConfig(name="jsonl", path=str(path), on_bad=on_bad), "train")
            except (BadLine, EmptyDataset):
                continue
            _use(task)

    def read_gsm8k(path: Path) -> None:
        (path.parent / "test.jsonl").write_bytes(path.read_bytes())
        _use(Gsm8k(Gsm8kConfig(name="gsm8k", path=str(path.parent), on_bad="skip"), "train"))

    def _use(task: Any) -> None:
        for index in range(len(task)):
            example = task[index]
            extract_answer(example.reference or "", "last_number")

    expected = (BadLine, EmptyDataset, DataConfigError)
    return [
        Target("jsonl", 0.06, [jsonl], _file("data.jsonl", read_jsonl), expected),
        Target("gsm8k", 0.04, [gsm8k], _file("train.jsonl", read_gsm8k), expected),
    ]


def _run_targets() -> list[Target]:
    from distill.checkpoint import MANIFEST, verify
    from distill.config import load_config
    from distill.errors import CheckpointError, ConfigError
    from distill.metrics import cut_back, read_metrics
    from distill.record_run import summarise
    from distill.records import RecordFolder
    from distill.runs import RunFolder

    overrides = [
        b"method=gkd\nengine.lr=0.003\ntrain.steps=5\nengine.betas=[0.9,0.95]", b"data=running_sum\ndata.modulus=7\nseed=3",
        b"experiment=demo_student\neval.k=[1,4]\neval.samples=4\nrollout.stop=['a','b']", b"+model.student.init={a: 1}\n~monitor",
    ]  # fmt: skip

    def manifest(data: bytes, folder: Path) -> None:
        for name in ("model.pt", "other.pt"):
            (folder / name).write_bytes(b"1234")
        (folder / MANIFEST).write_bytes(data)
        verify(folder, 2)

    def run_folder(data: bytes, folder: Path) -> None:
        run = RunFolder(folder / "run")
        run.path.mkdir()
        run.config.write_bytes(data)
        try:
            run.enter({"seed": 1, "train": {"steps": 3}}, "auto")
        finally:
            run.leave()

    def records(data: bytes, folder: Path) -> object:
        found = RecordFolder(folder)
        found.parts.mkdir()
        (found.parts / "rank_00000.jsonl").write_bytes(data)
        found.recover()
        found.merge()
        return summarise(found.read())

    def metrics(path: Path) -> object:
        cut_back(path, 1)
        return read_metrics(path)

    step = {"text": "1", "value": 0.5, "boundary": 0.6, "entropy": 0.1, "breach": False}
    one = {
        "item": 0, "sample": 0, "finish": "stop", "breach": True, "teacher_share": 0.5, "student_tokens": 4, "teacher_tokens": 2,
        "steps": [step], "takeovers": [{"step": 2, "rewound_to": 1, "tokens": 3}], "correct": True,
    }  # fmt: skip
    lines = [json.dumps(one | {"sample": number}) for number in range(3)]
    config = b"seed: 1\ntrain:\n  steps: 3\n"
    return [
        Target(
            "overrides",
            0.004,
            overrides,
            _text(lambda text: load_config("config", [line for line in text.split("\n") if line])),
            (ConfigError,),
        ),
        Target(
            "manifest",
            0.05,
            [b'{"step": 3, "world_size": 2, "files": {"model.pt": 4, "other.pt": 4}}'],
            manifest,
            (CheckpointError,),
        ),
        Target("run-config", 0.03, [config], run_folder, (CheckpointError, ConfigError)),
        Target("records", 0.04, [("\n".join(lines) + "\n").encode()], records, (CheckpointError,)),
        Target(
            "metrics",
            0.03,
            [b'{"step": 0, "train/loss": 1.5}\n{"step": 1, "train/loss": 1.25}\n{"step": 2}\n'],
            _file("metrics.jsonl", metrics),
            (CheckpointError,),
        ),
    ]


def _trace_targets() -> list[Target]:
    from ncclx_py.faults.notes import claimed
    from ncclx_py.watch.picture import draw
    from ncclx_py.watch.reading import read_job
    from ncclx_py.watch.report import as_json, as_text
    from ncclx_py.watch.verdict import judge

    def diagnose(data: bytes, folder: Path) -> None:
        for rank in (0, 1, 2):
            (folder / f"trace-rank-{rank}.jsonl").write_bytes(data if rank == 1 else dump(rank))
        for name in ("trace-rank-3.jsonl", "trace-rank-x.jsonl", "trace-rank-..jsonl"):
            (folder / name).symlink_to(folder)  # a folder where a dump is expected
        job = read_job(folder)
        verdict = judge(job)
        as_text(job, verdict)
        json.dumps(as_json(job, verdict))

    def pictured(data: bytes, folder: Path) -> None:
        diagnose(data, folder)
        job = read_job(folder)
        draw(job, judge(job), folder / "picture.png")

    def note(data: bytes, folder: Path) -> object:
        (folder / "fault-0.json").write_bytes(data)
        return claimed(folder, 0)

    fault = b'{"fault": "kill:rank=1,step=2", "rank": 1, "step": 2, "call": 9, "time_ns": 5}'
    return [
        Target("dumps", 0.2, [dump(1), dump(1, stuck=False)], diagnose, (ValueError,)),
        Target("picture", 0.002, [dump(1)], pictured, (ValueError,)),
        Target("notes", 0.02, [fault], note, (ValueError,)),
    ]


def _elastic_targets() -> list[Target]:
    import socket

    from distill.methods.base import SequenceFacts, Source
    from distill.wire import WireError, decode, encode
    from ncclx_py.elastic.errors import ElasticError
    from ncclx_py.elastic.journal import VERSION, read_events, schedule
    from ncclx_py.elastic.messages import Malformed, parse_address, receive

    def message(data: bytes, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(5.0)
            theirs.sendall(data[:100_000])
            theirs.shutdown(socket.SHUT_WR)
            while receive(ours) is not None:
                pass

    def journal(path: Path) -> None:
        read_events(path)
        schedule(path)

    body = json.dumps({"op": "join", "replica": "a", "step": 3, "token": ""}).encode()
    events = [{"event": "start", "version": VERSION}, {"event": "epoch", "epoch": 1, "step": 0, "members": [0, 1]}]
    events += [{"event": "commit", "step": step, "epoch": 1, "members": ["0", "1"]} for step in range(3)]
    lines = "".join(json.dumps(event) + "\n" for event in events).encode()
    facts = SequenceFacts(3, 1, Source.STUDENT, 5, 7, notes={"a": 0.5})
    values = [encode([facts, (None, {1: Path("a"), "b": b"x"}, {2})]), encode({(1, 2): [True, float("nan"), "é"]})]
    return [
        Target("wire", 0.04, values, lambda data, folder: decode(data), (WireError,)),
        Target("message", 0.04, [len(body).to_bytes(4, "big") + body], message, (Malformed, ConnectionError)),
        Target("journal", 0.02, [lines], _file("journal.jsonl", journal), (ElasticError, ValueError)),
        Target("address", 0.01, [b"127.0.0.1:29400", b"[::1]:80"], _text(parse_address), (ValueError,)),
    ]


def _cache_targets() -> list[Target]:
    import zlib

    from distill.errors import CacheError
    from distill.teachers.cache.index import INDEX, SHARDS, Contents, Index, contents_of, read_index
    from distill.teachers.cache.layout import Record
    from distill.teachers.cache.reader import CacheReader
    from distill.teachers.cache.repair import adopt, recover
    from distill.teachers.cache.shard import Shard, journal_of, part_of

    contents = Contents("teacher", [1.5, 2.5], "0" * 64, "topk", 2, "float32", 8, 16, 1.0, None)
    layout, data = contents.layout, bytes(range(96))
    size = layout.header_bytes(contents.json())
    records = [Record(bytes([i]) * 16, 3, size + 8 + 48 * i, zlib.crc32(data[48 * i : 48 * i + 48])) for i in (0, 1)]
    head = layout.header(records, contents.json(), size)
    shard = Shard("rank_00000_000000.safetensors", len(head) + len(data), "0" * 64, 2, 6)
    notes = [json.dumps({"key": r.key.hex(), "tokens": 3, "check": r.check}).encode() + b"\n" for r in records]
    seal = json.dumps({"sha256": "0" * 64, "bytes": shard.bytes}).encode() + b"\n"

    def read(folder: Path) -> None:
        reader = CacheReader(folder)
        for record in records:
            if record.key in reader:
                reader.read([(record.key, 3)])
        reader.close()

    def as_index(data_: bytes, folder: Path) -> None:
        (folder / SHARDS).mkdir()
        (folder / SHARDS / shard.file).write_bytes(head + data)
        (folder / INDEX).write_bytes(data_)
        read_index(folder)
        read(folder)

    def as_header(data_: bytes, folder: Path) -> None:
        """The JSON of a header, its length before it and the data behind it."""
        (folder / SHARDS).mkdir()
        path = folder / SHARDS / shard.file
        path.write_bytes(len(data_).to_bytes(8, "little") + data_ + data)
        Index(contents, (Shard(shard.file, path.stat().st_size, "", 2, 6),)).write(folder)
        adopt(path, layout, lambda text: contents.check_same(contents_of(json.loads(text)), path))
        read(folder)

    def as_journal(data_: bytes, folder: Path) -> object:
        path = folder / shard.file
        part_of(path).write_bytes(head + data)
        journal_of(path).write_bytes(data_)
        return recover(path, layout, contents.json())

    index = json.dumps({"format": "distill teacher cache 1", "contents": json.loads(contents.json()), "command": "c"})
    index = index[:-1] + ', "shards": [' + json.dumps({f: getattr(shard, f) for f in shard.__slots__}) + "]}"
    return [
        Target("cache-index", 0.03, [index.encode()], as_index, (CacheError,)),
        Target("cache-header", 0.03, [head[8:].rstrip()], as_header, (CacheError, ValueError)),
        Target(
            "cache-journal", 0.03, [b"".join(notes), b"".join([*notes, seal])], as_journal, (CacheError, ValueError)
        ),
    ]
