"""Routing: every sample has the teacher of its tag, in any layout, and each teacher's vocabulary counts for its own samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import Rank, RankFailure, RankPool, load
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from distill.config import TeacherSection, TeacherSource, load_config
from distill.data import Example, TokenSequence, collate
from distill.data.batch import TokenBatch
from distill.errors import ConfigError, DataError, TeacherLost
from distill.methods import Targets, build_method
from distill.micro_batches import MicroBatch
from distill.teachers.base import Teachers
from distill.teachers.colocated import Colocated
from distill.teachers.frozen import FrozenModel
from distill.teachers.routing import Route, Routed, check_many, joined, losses_by_teacher, ranks_of_teachers
from distill.teachers.signals import FullLogits, Parts, SampledToken, Signal, TopK
from distill.totals import StepTotals

pytestmark = pytest.mark.unit

SEQUENCES = [
    TokenSequence([3, 4, 5, 6, 7, 8], 2, "s0", tag="small"),
    TokenSequence([9, 3, 4], 1, "s1", supervised=[False, True], tag="large"),
    TokenSequence([5, 6, 7, 8, 9, 10, 11], 3, "s2", tag="large"),
    TokenSequence([8, 4, 3, 3], 1, "s3", tag="small"),
]
KINDS = ("logits", "hidden", "topk", "sampled")


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    """A student (20 ids), and two teachers: one has a smaller vocabulary (17 ids), one a larger (24)."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"student": 20, "small": 17, "large": 24}
    folders = {
        name: make_model(root / name, number, vocab_size=size, hidden_size=16 + 8 * number)
        for number, (name, size) in enumerate(sizes.items())
    }
    return {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}


def routed(models: dict[str, PreTrainedModel], kind: str, continues: bool = False) -> Routed:
    return Routed({name: Colocated(FrozenModel(models[name], name), kind, 5) for name in ("small", "large")}, continues)


def layouts() -> list[TokenBatch]:
    """Padded, packed, of one teacher alone, without any."""
    return [
        collate(SEQUENCES, 0, None),
        collate(SEQUENCES, 0, 12),
        collate([SEQUENCES[1], SEQUENCES[2]], 0, 12),
        collate([], 0, None),
    ]


@torch.no_grad()
def alone(model: PreTrainedModel, sequence: TokenSequence) -> Tensor:
    """``[t, V]`` logits of one sequence at its supervised tokens, straight from the model."""
    logits = model(torch.tensor([sequence.ids])).logits[0, sequence.prompt_length - 1 : -1]
    return logits if sequence.supervised is None else logits[torch.tensor(sequence.supervised)]


def targets_of(sequence: TokenSequence) -> Tensor:
    ids = torch.tensor(sequence.response_ids)
    return ids if sequence.supervised is None else ids[torch.tensor(sequence.supervised)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_position_has_its_own_teachers_answer(kind: str, models: dict[str, PreTrainedModel]) -> None:
    scorer = routed(models, kind)
    batches = layouts()
    scorer.submit(batches[:2])
    scorer.cancel()
    scorer.submit(batches[:3])
    scorer.submit(batches[3:])
    for batch in batches:
        signal = scorer.take(batch)
        assert len(signal) == len(batch.target_ids)
        assert signal.kind == kind
        begin = 0
        for sequence in batch.sequences:
            expected, ids = alone(models[str(sequence.tag)], sequence).log_softmax(-1), targets_of(sequence)
            rows = slice(begin, begin := begin + len(ids))
            at_ids = expected.gather(1, ids[:, None]).squeeze(1)
            if isinstance(signal, TopK):
                best, place = signal.logprobs[rows], signal.ids[rows]
                torch.testing.assert_close(best, expected.gather(1, place), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(best, expected.topk(5).values, rtol=1e-4, atol=1e-5)
                continue
            torch.testing.assert_close(signal.logprobs_at(batch.target_ids)[rows], at_ids, rtol=1e-4, atol=1e-5)
            if not isinstance(signal, SampledToken):
                found = signal.logits()[rows]
                width = expected.shape[1]
                torch.testing.assert_close(found[:, :width].log_softmax(-1), expected, rtol=1e-4, atol=1e-5)
                assert (found[:, width:] == -torch.inf).all()


def test_what_an_aligned_teacher_leaves_open_stays_open() -> None:
    parts = [
        (torch.tensor([1, 2, 5]), SampledToken(torch.tensor([-1.0, 0.0, -5.0]), torch.tensor([True, False, True]))),
        (torch.tensor([0, 3, 4]), SampledToken(torch.tensor([-0.5, -3.0, -4.0]))),
    ]
    found = joined(parts)
    assert isinstance(found, SampledToken)
    assert found.logprobs.tolist() == [-0.5, -1.0, 0.0, -3.0, -4.0, -5.0]
    assert found.known_ids(torch.arange(6)).tolist() == [0, 1, -1, 3, 4, 5]


@pytest.mark.parametrize("kind", ["logits", "hidden"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_losses_are_those_of_each_teacher_alone(kind: str, divergence: str, models: dict[str, PreTrainedModel]) -> None:
    """On the ids that the student and that sample's teacher share: nothing is impossible because another teacher is larger."""
    batch = layouts()[1]
    scorer = routed(models, kind)
    scorer.submit([batch])
    teacher = scorer.take(batch)
    assert isinstance(teacher, Parts)
    with torch.no_grad():
        student = torch.cat([alone(models["student"], sequence) for sequence in SEQUENCES])
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    method = build_method({"name": "off_policy", "divergence": {"kind": divergence}})
    made = losses_by_teacher(
        method, Targets(FullLogits(ours), teacher, batch.target_ids, sequence_index=batch.sequence_index)
    )
    losses = []
    for number, sequence in enumerate(SEQUENCES):
        theirs = alone(models[str(sequence.tag)], sequence).double()
        width = min(20, theirs.shape[1])
        q = exact[batch.sequence_index == number][:, :width].log_softmax(-1)
        p = theirs[:, :width].log_softmax(-1)
        losses.append(((p - q) * p.exp() if divergence == "forward_kl" else (q - p) * q.exp()).sum(-1))
    expected = torch.cat(losses)
    torch.testing.assert_close(made.loss.double(), expected, rtol=1e-4, atol=1e-5)
    weights = torch.linspace(0.5, 1.5, len(expected))
    (made.loss * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert ours.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    assert all(figure.shape == made.loss.shape for figure in made.stats.values())
    reverse = made.stats["reverse_kl"].double()
    assert reverse.isfinite().all()


def test_figures_per_teacher(models: dict[str, PreTrainedModel]) -> None:
    batch = layouts()[0]
    method = build_method({"name": "off_policy"})
    scorer = routed(models, "logits")
    scorer.submit([batch])
    student = FullLogits(torch.cat([alone(models["student"], sequence) for sequence in SEQUENCES]))
    losses = losses_by_teacher(method, Targets(student, scorer.take(batch), batch.target_ids))
    totals = StepTotals(["small", "large", "idle"])
    totals.add(losses, torch.zeros(len(batch.target_ids)), batch)
    figures = totals.teacher_figures(totals.values()[2:])
    mine = torch.tensor([SEQUENCES[i].tag == "small" for i in batch.sequence_index])
    assert figures["teacher/small/tokens"] == 4 + 3
    assert figures["teacher/large/tokens"] == 1 + 4
    assert figures["teacher/idle/tokens"] == 0
    assert figures["teacher/small/loss"] == pytest.approx(float(losses.loss[mine].mean()), rel=1e-5)
    assert figures["teacher/large/loss"] == pytest.approx(float(losses.loss[~mine].mean()), rel=1e-5)
    assert "teacher/idle/loss" not in figures


class Lost:
    """A teacher that answers so often and then no more."""

    ahead, may_be_lost = False, False

    def __init__(self, inner: Colocated, answers: int) -> None:
        self.inner, self.answers = inner, answers

    def submit(self, batches: Sequence[TokenBatch]) -> None:
        assert self.answers >= 0, "asked again after it was lost"
        self.inner.submit(batches)

    def take(self, batch: TokenBatch) -> Signal:
        self.answers -= 1
        if self.answers < 0:
            raise TeacherLost("rank 5 is gone")
        return self.inner.take(batch)

    def figures(self) -> dict[str, float]:
        return {}

    def recover(self) -> bool:
        return True

    def cancel(self) -> None:
        self.inner.cancel()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_teachers_samples_no_longer_count(
    kind: str, models: dict[str, PreTrainedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    scorer = routed(models, kind, continues=True)
    scorer.scorers["large"] = Lost(scorer.scorers["large"], 1)  # type: ignore[arg-type]
    copies = type("Copies", (), {})()
    teachers = Teachers(copies, scorer, None, None, scorer.silent)
    batch = layouts()[0]
    large = torch.tensor([SEQUENCES[i].tag == "large" for i in batch.sequence_index])
    for step in range(3):
        micro = MicroBatch(batch, batch, torch.ones(len(large)), torch.ones(len(large)), None)
        teachers.submit([micro])
        signal, _ = teachers.take(micro)
        assert micro.scales.tolist() == (~large | (step == 0)).float().tolist()
        student = torch.cat([alone(models["student"], sequence) for sequence in SEQUENCES]).requires_grad_()
        method = build_method({"name": "on_policy"})
        made = losses_by_teacher(method, Targets(FullLogits(student), signal, batch.target_ids))
        made.loss.sum().backward()
        assert student.grad is not None
        if step:
            assert (made.loss[large] == 0).all()
            assert (student.grad[large] == 0).all()
        assert (made.loss[~large] != 0).all()
    assert "teacher 'large' is lost (rank 5 is gone); its samples no longer count" in " ".join(
        capsys.readouterr().err.split()
    )
    assert scorer.figures()["lost"] == 1.0
    strict = routed(models, kind)
    strict.scorers["small"] = Lost(strict.scorers["small"], 0)  # type: ignore[arg-type]
    strict.submit([batch])
    with pytest.raises(TeacherLost, match="rank 5"):
        strict.take(batch)


# ---------------------------------------------------------------- which teacher


def section(**many: TeacherSource) -> TeacherSection:
    return TeacherSection(many=many, route="task")


def test_a_tag_names_its_teacher_or_the_sample_is_refused() -> None:
    route = Route(section(math=TeacherSource(path="a", tags=["gsm8k", "7"], weight=2.0), sums=TeacherSource(path="b")))
    example = Example("file:3", "1+1", "2", "2", {"task": "gsm8k"})
    assert route.teacher_of(example) == "math"
    assert route.teacher_of(replace(example, metadata={"task": 7})) == "math"
    assert route.teacher_of(replace(example, metadata={"task": "sums"})) == "sums"
    assert route.weights == {"math": 2.0, "sums": 1.0}
    with pytest.raises(DataError, match=r"sample file:3 has task=poems, .* math \(math, gsm8k, 7\); sums \(sums\)"):
        route.teacher_of(replace(example, metadata={"task": "poems"}))
    with pytest.raises(DataError, match=r"sample file:3 has no 'task' in its metadata"):
        route.teacher_of(replace(example, metadata={}))


@pytest.mark.parametrize(
    ("many", "mixture", "message"),
    [
        (
            {"a": TeacherSource(path="x", tags=["t"]), "b": TeacherSource(path="y", tags=["t"])},
            "route",
            "'t' is claimed by 'a' and by 'b'",
        ),
        (
            {"a": TeacherSource(path="x"), "b": TeacherSource(path="y", tags=["a"])},
            "route",
            "'a' is claimed by 'a' and by 'b'",
        ),
        ({"a": TeacherSource(path="x", tags=["t"])}, "mean", "remove the tags"),
        ({"a": TeacherSource(path="x", weight=0.0)}, "mean", "every weight in teacher.many is 0"),
        ({"reference": TeacherSource(path="x")}, "route", "'reference' cannot be a teacher's name"),
        ({"a/b": TeacherSource(path="x")}, "route", "'a/b' cannot be a teacher's name"),
        ({"a": TeacherSource(path="x", url=["http://h:1"])}, "route", "teacher.many.a.url=http://h:1 is a server, and"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(many: dict[str, TeacherSource], mixture: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_many(TeacherSection(many=many, mixture=mixture))


def test_every_teacher_has_a_rank_and_every_rank_a_teacher() -> None:
    for teachers in range(1, 5):
        names = [f"t{i}" for i in range(teachers)]
        for ranks in range(1, 9):
            held = ranks_of_teachers(names, ranks)
            assert list(held) == names
            sizes = [len(places) for places in held.values()]
            assert min(sizes) >= 1
            assert max(sizes) - min(sizes) <= 1
            assert {place for places in held.values() for place in places} == set(range(ranks))
            if ranks >= teachers:
                assert sum(sizes) == ranks, "none holds two where there are enough"


# ---------------------------------------------------------------- whole runs


def overrides(folder: Path, models: dict[str, Path], *more: str) -> list[str]:
    many = f"+teacher.many={{sums: {{path: {models['teacher']}, weight: 2.0}}, other: {{path: {models['wide']}, tags: [start]}}}}"
    parts = [
        "data.parts.sums.min_terms=2",
        "+data.parts.start={name: running_sum, seed: 5, min_terms: 3, max_terms: 4}",
    ]
    sizes = [
        "train.steps=2",
        "train.batch_size=8",
        "train.micro_batch_size=2",
        "train.max_length=64",
        "rollout.max_new_tokens=12",
    ]
    return [
        "model=hf",
        f"model.student.path={models['student']}",
        "model.teacher_dtype=float32",
        "method=on_policy",
        "data=mixed",
        "~data.parts.start",
        *parts,
        *sizes,
        many,
        "teacher.route=part",
        "run.tensorboard=false",
        f"run.dir={folder}",
        *more,
    ]


def run(me: Rank, chosen: list[str]) -> None:
    from distill.train import train

    me.init("ncclx")
    train(load_config("config", chosen))


@pytest.mark.dist
def test_a_run_has_the_same_losses_on_one_rank_and_on_two(
    one_rank: RankPool, two_ranks: RankPool, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    for pool, name in ((one_rank, "one"), (two_ranks, "two")):
        pool.run(run, overrides(tmp_path / name, tiny_models, "teacher.signal=hidden"))
    rows = {name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("one", "two")}
    for ours, theirs in zip(rows["one"], rows["two"], strict=True):
        for key in (
            "train/loss",
            "teacher/sums/loss",
            "teacher/other/loss",
            "teacher/sums/tokens",
            "teacher/other/tokens",
        ):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
        shares = {name: ours[f"teacher/{name}/tokens"] * ours[f"teacher/{name}/loss"] for name in ("sums", "other")}
        weighted = (2.0 * shares["sums"] + shares["other"]) / ours[
            "train/tokens"
        ]  # weights scale losses, not their number
        assert ours["train/loss"] == pytest.approx(weighted, rel=1e-4)


@pytest.mark.dist
def test_a_sample_without_a_teacher_stops_the_run(
    one_rank: RankPool, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RankFailure, match=r"sample running_sum/train/\d+ has part=start"):
        one_rank.run(run, overrides(tmp_path, tiny_models, "teacher.many.other.tags=[]"))
    assert not (tmp_path / "final").exists()


@pytest.mark.dist
def test_each_teacher_may_have_a_server_of_its_own(
    one_rank: RankPool, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    stub = load(Path(__file__).with_name("placements.py"), "placements").VllmStub
    shared = ["teacher.top_k=5", "teacher.many.sums.weight=1.0"]
    with ExitStack() as servers:
        urls = []
        for name, key in (("sums", "teacher"), ("other", "wide")):
            model = AutoModelForCausalLM.from_pretrained(tiny_models[key]).eval()
            server = servers.enter_context(stub(model, tokenizer=AutoTokenizer.from_pretrained(tiny_models[key])))
            server.names = [str(tiny_models[key])]
            urls.append(f"+teacher.many.{name}.url=['{server.url}']")
        one_rank.run(run, overrides(tmp_path / "served", tiny_models, *shared, "teacher=server", *urls))
    one_rank.run(run, overrides(tmp_path / "beside", tiny_models, *shared, "teacher.signal=topk"))
    served, beside = (
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").open()] for n in ("served", "beside")
    )
    for ours, theirs in zip(served, beside, strict=True):
        for key in ("train/loss", "teacher/sums/loss", "teacher/other/loss"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
