"""Several jobs that train one model: killed, stopped, and with a store that dies too, they end where a whole run ends."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import load

from distill.bench.replicas import check_samples, differing_files, done, live
from distill.config import load_config
from distill.errors import ConfigError
from distill.metrics import read_metrics
from distill.replicas.books import SampleBook, SharedLog, read_samples
from distill.replicas.one import deal

forked = load(Path(__file__).with_name("forked_replicas.py"), "forked_replicas")
BATCH, STEPS, DEADLINE = 24, 60, 4.0


def until(cluster: Any, condition: Any, what: str) -> None:
    limit = time.monotonic() + 120
    while not condition(cluster.events()):
        cluster.check_jobs()
        assert time.monotonic() < limit, f"{what}: {cluster.events()[-3:]}"
        time.sleep(0.01)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock or on who lives."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("perf/", "replica/")) and "per_s" not in key}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.dist
def test_faults_lose_nothing_and_leave_the_weights_of_a_whole_run(tmp_path: Path) -> None:
    overrides = [f"train.steps={STEPS}", "engine.zero_stage=2", "checkpoint.every=25", "monitor.baseline_steps=2"]
    overrides += [
        "train.pack=false",
        "eval.every=30",
        "eval.examples=4",
        "eval.kl_examples=0",
        "rollout.max_new_tokens=4",
    ]
    with forked.ForkedCluster(tmp_path / "broken", 3, overrides, DEADLINE) as broken:
        for replica in range(3):
            broken.start(replica)
        victim, sleeper = 0, 1  # the one that leads is killed, another one sleeps
        until(broken, lambda events: done(events) > 8, "training begins")
        broken.kill(victim)
        until(broken, lambda events: len(live(events)) == 2, "the epoch ends")
        broken.start(victim)
        until(broken, lambda events: len(live(events)) == 3, "the killed one returns")
        broken.kill_store()
        time.sleep(0.3)
        broken.start_store()
        broken.kill(sleeper, signal.SIGSTOP)
        until(broken, lambda events: sleeper not in live(events), "the sleeper is dropped")
        broken.kill(sleeper, signal.SIGCONT)
        broken.wait(120)
        assert check_samples(broken, STEPS, BATCH) == {"lost": 0, "repeated": 0}
    overrides.append(f"engine.replicas.schedule={broken.journal}")
    with forked.ForkedCluster(tmp_path / "whole", 3, overrides, 60.0) as whole:
        for replica in range(3):
            whole.start(replica)
        whole.wait(120)
    assert differing_files(broken.folder, whole.folder, STEPS) == []
    assert rows(broken.folder) == rows(whole.folder)
    assert [row["step"] for row in rows(broken.folder)] == list(range(STEPS + 1))


@pytest.mark.unit
def test_every_sample_is_dealt_once_whatever_the_number_of_places() -> None:
    for size in (1, 7, 24):
        for places in range(1, 30):
            parts = [deal(range(100, 100 + size), places, place) for place in range(places)]
            assert [sample for part in parts for sample in part] == list(range(100, 100 + size))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match="does not exist"):
        deal(range(4), 2, 2)


@pytest.mark.unit
def test_metrics_have_each_step_once_when_another_replica_takes_over(tmp_path: Path) -> None:
    options = SimpleNamespace(tensorboard=False, wandb=None)
    folder = SimpleNamespace(metrics=tmp_path / "metrics.jsonl", path=tmp_path)
    trainer: Any = SimpleNamespace(folder=folder, config=SimpleNamespace(run=options, resolved={}))
    leader = [0]
    logs = [SharedLog(trainer, lambda me=me: leader[0] == me) for me in range(2)]  # type: ignore[misc]
    for step in (1, 2, 3):
        for log in logs:
            log.write(step, {"x": float(step)})
    logs[1].write(4, {"x": 4.0})  # 0 died before it wrote step 4, while it wrote: a torn line
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "x"')
    leader[0] = 1
    logs[1].write(5, {"x": 5.0})
    logs[0].write(4, {"x": -1.0})  # it was only asleep, and still holds its file
    logs[1].write(6, {"x": 6.0})
    assert [(row["step"], row["x"]) for row in read_metrics(folder.metrics)] == [(n, float(n)) for n in range(1, 7)]


@pytest.mark.unit
def test_the_sample_book_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    SampleBook(path).write(0, 1, [0, 1], [3, 4])
    with path.open("a") as file:
        file.write('{"step": 1, "epo')
    SampleBook(path).write(1, 2, [0], [5])
    assert read_samples(path) == {(0, 1): [3, 4], (1, 2): [5]}


@pytest.mark.unit
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.replicas.id=2", "between 0 and 1"),
        ("engine.replicas.min=3", "between 1 and 2"),
        ("engine.replicas.backend=mpi", "ncclx, gloo, nccl"),
        ("engine.replicas.deadline_s=0", "at least 1"),
        ("engine.replicas.stroe=x", "did you mean 'engine.replicas.store'"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("config", [override])
