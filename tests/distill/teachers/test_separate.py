"""Teachers on ranks of their own: what crosses the bridge, any numbers of students and teachers, faults, parts of a model."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import Rank, RankPool, load
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.config import load_config
from distill.data import TokenSequence, collate
from distill.data.batch import TokenBatch
from distill.errors import CheckpointError, ConfigError, ModelError, TeacherRankLost
from distill.metrics import read_metrics
from distill.teachers.base import SelfCopies, Teachers
from distill.teachers.frozen import FrozenModel
from distill.teachers.separate.requests import deal, from_words, put_together, to_words

placements = load(Path(__file__).with_name("placements.py"), "placements")
RANKS = 4
STEPS = 6


def random_batch(draw: random.Random) -> TokenBatch:
    sequences = []
    for number in range(draw.randint(1, 7)):
        length = draw.randint(1, 9)
        prompt = draw.randint(0, length)
        supervised = [draw.random() < 0.7 for _ in range(length - prompt)] if draw.random() < 0.5 else None
        ids = [draw.randrange(2**31) for _ in range(length)]
        sequences.append(TokenSequence(ids, prompt, str(number), supervised=supervised))
    return collate(sequences, 3, draw.choice([None, 9, 20]))


def what_a_teacher_sees(batch: TokenBatch) -> list[Tensor | None]:
    return [batch.input_ids, batch.position_ids, batch.attention_mask, batch.target_index, batch.target_ids]


@pytest.mark.unit
def test_a_batch_is_the_same_on_the_other_side() -> None:
    for seed in range(200):
        batch = random_batch(random.Random(seed))
        words = to_words(batch)
        if not len(batch.target_ids):
            assert len(words) == 0
            continue
        for ours, theirs in zip(what_a_teacher_sees(from_words(words)), what_a_teacher_sees(batch), strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)  # type: ignore[arg-type]


@pytest.mark.unit
def test_rows_are_dealt_evenly_and_come_back_in_order() -> None:
    for seed in range(200):
        draw = random.Random(seed)
        students, teachers, loads = draw.randint(1, 5), draw.randint(1, 5), [0.0] * 5
        for student in range(students):
            batch = random_batch(draw)
            parts = deal(batch, student, students, teachers)
            answers = [what_a_teacher_sees(part.batch)[4] for part in parts]
            assert torch.equal(put_together(parts, answers), batch.target_ids)  # type: ignore[arg-type]
            rows = [len(part.batch.input_ids) for part in parts]
            assert sum(rows) == len(batch.input_ids)
            for teacher, count in enumerate(rows):
                loads[teacher] += count / len(batch.input_ids)
                if students % teachers == 0:
                    assert count in (0, len(batch.input_ids)), "a whole batch each, in the layout that the student has"
        # One teacher's share of all batches; a row more or less at each of the two ends of its piece.
        assert all(abs(share - students / teachers) <= 2 for share in loads[:teachers])


@pytest.mark.unit
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=motab"], "the teacher writes"),
        (["method=opsdc"], "copy of the student"),
        (["method=sft", "data.name=running_sum"], "nothing to do"),
        (["engine.replicas.enabled=true"], "replicas"),
        (["eval.every=2"], "eval.kl_examples=0"),
        (["teacher.on_loss=continue", "comm.backend=gloo"], "comm=ncclx"),
        (["teacher.on_loss=continue", "teacher.shard=tensor", "teacher.ranks=2"], "teacher.on_loss=stop"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(overrides: list[str], message: str) -> None:
    from distill.teachers.separate.meeting import check_separate

    config = load_config("config", ["teacher=separate", "method=off_policy", "model.teacher.path=x", *overrides])
    with pytest.raises(ConfigError, match=message):
        check_separate(config)


@pytest.mark.unit
def test_parameters_that_change_are_noticed(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "teacher", 3)
    teacher = FrozenModel(AutoModelForCausalLM.from_pretrained(folder))
    monkeypatch.setattr(placements, "teacher_of", lambda _: teacher)
    batch = collate([TokenSequence([3, 4, 5], 1, "a")], 0, None)
    with placements.separate(placements.Case(folder, "hidden", 5, [batch], tmp_path)) as scorer:
        method = SimpleNamespace(needs=frozenset({"teacher"}), self_teacher=None)
        parts = SimpleNamespace(student=teacher.model, reference=None)
        teachers = Teachers(SelfCopies(method, parts), scorer, None, None, held={"teacher": scorer})  # type: ignore[arg-type]
        scorer.submit([batch])
        state = teachers.state()
        teachers.restore(state)
        scorer.take(batch)
        with torch.no_grad():
            next(iter(teacher.model.parameters()))[0, 0] += 0.01
        with pytest.raises(ModelError, match=r"weights of the teacher have changed since the run began"):
            teachers.state()
        later = Teachers(SelfCopies(method, parts), scorer, None, None, held={"teacher": scorer})  # type: ignore[arg-type]
        with pytest.raises(
            CheckpointError, match="the teacher has other weights than the one that this run was started with"
        ):
            later.restore(state)


# Whole runs


@pytest.fixture(scope="module")
def pool(make_trainers: Callable[[int], RankPool]) -> Iterator[RankPool]:
    with make_trainers(RANKS) as ranks:
        yield ranks


def job(me: Rank, size: int, port: int, overrides: list[str], death: tuple[int, int] = (-1, 0)) -> str:
    """A run of the first ``size`` ranks; the exit error, or "". ``death``: a teacher's rank, and its last tick."""
    from distill.teachers.separate.serving import Server
    from distill.train import train

    if me.rank >= size:
        return ""
    os.environ.update(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    me.leave()
    answers, left = Server._answers, [death[1]]

    def dying(server: Server, *asked: Any) -> list[Tensor]:
        left[0] -= 1
        if me.rank == death[0] and left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return answers(server, *asked)

    Server._answers = dying  # type: ignore[method-assign]
    try:
        train(load_config("config", overrides))
    except (TeacherRankLost, ModelError) as error:
        return str(error)
    finally:
        Server._answers = answers  # type: ignore[method-assign]
    return ""


def run(pool: RankPool, size: int, overrides: list[str], **options: Any) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dying = {options["death"][0]} if "death" in options else set()
    return pool.run(job, size, port, overrides, options.get("death", (-1, 0)), dying=dying, deadline=120)


def figures(folder: Path) -> list[tuple[float, float]]:
    return [(row["train/loss"], row["train/grad_norm"]) for row in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def common(base_overrides: list[str]) -> list[str]:
    return [*base_overrides, "method=off_policy", "teacher.signal=hidden", f"train.steps={STEPS}", "comm.timeout_s=30"]


@pytest.fixture(scope="module")
def colocated(pool: RankPool, common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Losses and gradient norms of the run with the teacher beside ``students`` ranks."""
    known: dict[tuple[Any, ...], Any] = {}

    def measure(students: int, *overrides: str) -> list[tuple[float, float]]:
        if (students, overrides) not in known:
            folder = tmp_path_factory.mktemp("colocated")
            run(pool, students, [*common, *overrides, f"run.dir={folder}"])
            known[students, overrides] = figures(folder)
        return known[students, overrides]

    return measure


@pytest.mark.dist
@pytest.mark.parametrize(
    ("students", "teachers", "overrides"),
    [(1, 1, ()), (2, 2, ("engine.zero_stage=2", "train.micro_batch_size=2")), (1, 3, ())],
    ids=["1 student, 1 teacher", "2 students, 2 teachers, accumulation", "1 student, 3 teachers"],
)
def test_losses_are_those_of_a_teacher_in_process(
    students: int,
    teachers: int,
    overrides: tuple[str, ...],
    pool: RankPool,
    common: list[str],
    colocated: Callable[..., Any],
    tmp_path: Path,
) -> None:
    separate = ["teacher.placement=separate", f"teacher.ranks={teachers}", f"run.dir={tmp_path}"]
    run(pool, students + teachers, [*common, *overrides, *separate])
    ours, theirs = figures(tmp_path), colocated(students, *overrides)
    if students % teachers == 0:
        assert ours == theirs, "the same rows in the same layout: the same bits"
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-7)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    if students == 1:  # fp32 hidden states of 24 columns
        assert [row["teacher/bytes"] for row in rows] == [row["train/tokens"] * 24 * 4 for row in rows]
    assert all(0 < row["teacher/busy"] <= 1 for row in rows)


@pytest.mark.dist
@pytest.mark.parametrize("shard", ["tensor", "zero3"])
def test_a_teacher_in_parts_says_the_same(
    shard: str,
    pool: RankPool,
    common: list[str],
    colocated: Callable[..., Any],
    make_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.getbasetemp() / "parts"
    if not root.exists():
        make_model(root / "teacher", 4, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    teacher = f"model.teacher.path={root / 'teacher'}"
    sharded = ["teacher.placement=separate", "teacher.ranks=2", f"teacher.shard={shard}", f"run.dir={root / shard}"]
    run(pool, 3, [*common, teacher, *sharded])
    torch.testing.assert_close(
        torch.tensor(figures(root / shard)), torch.tensor(colocated(1, teacher)), rtol=1e-4, atol=1e-6
    )


@pytest.mark.dist
def test_heads_that_cannot_be_divided_are_refused_on_every_rank(
    pool: RankPool, common: list[str], tmp_path: Path
) -> None:
    sharded = ["teacher.placement=separate", "teacher.ranks=2", "teacher.shard=tensor", f"run.dir={tmp_path}"]
    said = run(pool, 3, [*common, *sharded])
    assert all("cannot divide the 1 key-value heads" in text for text in said[:3]), said


@pytest.mark.dist
def test_a_teacher_that_dies_leaves_students_with_a_good_checkpoint(
    pool: RankPool, common: list[str], colocated: Callable[..., Any], tmp_path: Path
) -> None:
    from ncclx_py.watch.reading import read_job
    from ncclx_py.watch.verdict import judge

    separate = [*common, "teacher.placement=separate", f"run.dir={tmp_path}"]
    said = run(pool, 3, separate, death=(2, 3))
    assert all("teacher rank 2 of this job is lost" in text for text in said[:2]), said
    verdict = judge(read_job(tmp_path / "trace"))
    assert (verdict.word, verdict.ranks) == ("RANK_CRASHED", [2])
    assert 0 < len(figures(tmp_path)) < STEPS
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 1
    assert run(pool, 3, separate) == [""] * RANKS
    assert figures(tmp_path) == colocated(2)


@pytest.mark.dist
def test_the_run_goes_on_with_the_teachers_that_are_left(
    pool: RankPool, common: list[str], colocated: Callable[..., Any], tmp_path: Path
) -> None:
    accumulating = ("engine.zero_stage=2", "train.micro_batch_size=2")
    separate = ["teacher.placement=separate", "teacher.ranks=2", "teacher.on_loss=continue", f"run.dir={tmp_path}"]
    said = run(pool, 4, [*common, *accumulating, *separate], death=(2, 9))
    assert said[:2] == ["", ""], said
    assert figures(tmp_path) == colocated(2, *accumulating)
