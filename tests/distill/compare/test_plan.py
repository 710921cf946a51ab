"""Which runs a comparison consists of, what each is given, and which folders on disk it accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.compare.config import load_comparison
from distill.compare.plan import Job, jobs_of
from distill.compare.state import admit, begin, changes, complete, finish, settings_of
from distill.errors import ConfigError

pytestmark = pytest.mark.unit

METHODS = ["experiment=methods", "compare.entries=[gkd,motab]", "compare.seeds=[3]"]
TWO_SEEDS = "compare.seeds=[3,5]"
TRACES = [
    "+stages.traces.command=rollout",
    "+stages.traces.per_seed=true",
    '+stages.traces.overrides=["model.student.path={warmup}","model.teacher.path={teacher}","rollout.examples=9"]',
    '+entries.read=["method=sft","data=jsonl","data.path={traces}"]',
    "compare.entries=[read,gkd]",
    'task=["data=running_sum","data.max_digits=2"]',
]


def plan(*overrides: str) -> list[Job]:
    return jobs_of(load_comparison([*METHODS, *overrides]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["compare.entries=[motb]"], ["motb", "did you mean 'motab'"]),
        (["compare.entries=[]"], ["compare.entries=[]", "gkd"]),
        (["compare.seeds=[]"], ["compare.seeds=[]", "at least one"]),
        (["compare.seeds=[1,1]"], ["compare.seeds=[1, 1]", "once"]),
        (["compare.budget.steps=0"], ["compare.budget.steps=0", "at least 1"]),
        (["compare.rank=2"], ["compare.rank", "did you mean 'compare.ranks'"]),
        (["entries.gkd=gkd"], ["entries.gkd", "must be a list"]),
        (['entries.gkd=["method=gkd","method.lambda=1"]'], ["entries.gkd", "did you mean 'method.lambda_'"]),
        (["+entries.a/b=[]"], ["a/b"]),
        (["+train.steps=3"], ["train", "common"]),
        (["eval.k=[9]"], ["eval.k=[9]", "eval.samples=9"]),
        (["compare.ranks=3"], ["stages.teacher", "3 ranks"]),
        (["+stages.warmup.command=evaluate"], ["command=evaluate", "train, rollout"]),
        (['task=["data=running_som"]'], ["task", "running_sum"]),
        (
            [*TRACES[:2], '+stages.traces.overrides=["rollout.example=3"]', *TRACES[3:]],
            ["stages.traces", "rollout.examples"],
        ),
        (['stages.teacher.overrides=["model.teacher.path={warmup}"]'], ["{warmup}", "per_seed"]),
        (
            ["stages.teacher.per_seed=true", 'stages.teacher.overrides=["model.teacher.path={warmup}"]'],
            ["circle", "stages.warmup"],
        ),
    ],
)
def test_mistakes_stop_before_anything_runs(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(*overrides)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match="experiment=methods"):
        load_comparison([])


def test_every_entry_of_the_shipped_experiment_can_be_composed() -> None:
    comparison = load_comparison(["experiment=methods", "compare.seeds=[0]"])
    named = {job.config.method["name"] for job in jobs_of(comparison) if not job.stage}
    assert named >= {
        "motab", "off_policy", "seqkd", "on_policy", "gkd", "akl", "skd", "paced", "opsdc", "hpd", "gopd", "essence", "grpo", "ace",
    }  # fmt: skip


def test_one_seed_means_one_student_one_order_and_one_budget() -> None:
    jobs = plan(
        TWO_SEEDS, "compare.budget.steps=7", "compare.budget.tokens=900", 'extra=["engine.lr=0.5"]', "compare.dir=D"
    )
    titles = [job.title for job in jobs]
    assert titles == [
        "teacher", "warmup seed 3", "warmup seed 5", "gkd seed 3", "motab seed 3", "gkd seed 5", "motab seed 5",
    ]  # fmt: skip
    by = dict(zip(titles, jobs, strict=True))
    for seed in (3, 5):
        for name in ("gkd", "motab"):
            config = by[f"{name} seed {seed}"].config
            assert (config.seed, config.train.steps, config.train.token_budget, config.engine.lr) == (seed, 7, 900, 0.5)
            assert config.model.student.path == f"D/stages/warmup/seed_{seed}/final"
            assert config.model.teacher.path == "D/stages/teacher/final"
            assert config.run.dir == f"D/entries/{name}/seed_{seed}"
    assert by["warmup seed 5"].config.seed == 5
    assert by["warmup seed 5"].config.engine.lr == 0.5
    assert by["warmup seed 5"].config.train.token_budget is None
    assert {used.title for used in by["gkd seed 5"].after} == {"teacher", "warmup seed 5"}


def test_a_changed_entry_is_noticed_and_so_is_a_changed_teacher(tmp_path: Path) -> None:
    where = f"compare.dir={tmp_path}"
    jobs = plan(where)
    for job in jobs:
        begin(job)
        finish(job, {"pass_at_1": 0.5})
    same = plan(where, "compare.parallel=2", 'extra=["checkpoint.every=7","comm.backend=gloo"]')
    assert [changes(job) for job in same] == [[]] * len(same)
    admit(same, "refuse")

    lambdas = plan(where, 'entries.gkd=["method=gkd","method.text=teacher","method.lambda_=0.25"]')
    assert {job.title for job in lambdas if changes(job)} == {"gkd seed 3"}
    with pytest.raises(ConfigError, match=r"gkd/seed_3 .*method.lambda_: 0.5 there, 0.25 now.*changed=rerun"):
        admit(lambdas, "refuse")
    assert all(complete(job) for job in jobs)

    teacher = plan(where, 'stages.teacher.overrides=["experiment=demo_teacher","train.steps=5"]')
    assert all(changes(job) for job in teacher)  # all learn from it, or are measured against it
    assert "the model of teacher has changed" in changes(teacher[-1])

    admit(lambdas, "rerun")
    assert {job.title for job in jobs if complete(job) is None} == {"gkd seed 3"}


def test_a_comparison_goes_on_after_an_upgrade_that_brought_new_keys(tmp_path: Path) -> None:
    """Folders of a version that knew less are up to date where the new keys have their defaults, and only there."""
    where = f"compare.dir={tmp_path}"
    jobs = {job.title: job for job in plan(*TRACES, where)}
    for job in jobs.values():
        begin(job)
        finish(job, {"student_tokens": 1})
        for file, path in [
            ("job.json", "train.engine.clip"),
            ("job.json", "train.teacher"),
            ("job.json", "records.split"),
            ("outcome.json", "eval.top_p"),
        ]:
            forget(job.folder.path / file, path)
    for job in jobs.values():  # as they would have been written then: a stage's digest is that of what it knew
        (job.folder.path / "job.json").write_text(
            json.dumps(json.loads((job.folder.path / "job.json").read_text()) | {"after": settings_of(job)["after"]})
        )
    assert not any(changes(job) for job in plan(*TRACES, where))
    assert all(complete(job) for job in plan(*TRACES, where))

    clipped = plan(*TRACES, where, 'extra=["engine.clip=0.5"]', "eval.top_p=0.9")
    assert all("engine.clip: 1.0 there, 0.5 now" in changes(job) for job in clipped if job.records is None)
    assert "the model of teacher has changed" in changes(clipped[-1])
    assert not any(complete(job) for job in clipped if job.records is None)


def forget(file: Path, path: str) -> None:
    """Remove a key from a JSON file, as if it had been written before the key was known."""
    document = json.loads(file.read_text())
    *above, last = path.split(".")
    inner = document
    for name in above:
        inner = inner.get(name, {})
    inner.pop(last, None)
    file.write_text(json.dumps(document))


def test_other_evaluation_settings_ask_for_the_evaluation_alone(tmp_path: Path) -> None:
    where = f"compare.dir={tmp_path}"
    for job in plan(where):
        begin(job)
        finish(job, {"pass_at_1": 0.5})
    finer = plan(where, "eval.samples=32", "eval.k=[1,32]")
    admit(finer, "refuse")
    assert not any(complete(job) for job in finer)
    assert all(json.loads((job.folder.path / "job.json").read_text())["train"]["seed"] in (0, 3, 5) for job in finer)


def test_a_stage_may_write_records_and_the_measurement_may_be_elsewhere(tmp_path: Path) -> None:
    where = f"compare.dir={tmp_path}"
    by = {job.title: job for job in plan(*TRACES, where)}
    traces, read = by["traces seed 3"], by["read seed 3"]
    assert traces.records is not None
    assert (traces.records.examples, traces.records.samples, traces.config.seed) == (9, 5, 3)
    assert traces.config.model.student.path == f"{tmp_path}/stages/warmup/seed_3/final"
    assert read.config.resolved["data"]["path"] == f"{tmp_path}/stages/traces/seed_3/records.jsonl"
    assert {used.title for used in read.after} == {"teacher", "warmup seed 3", "traces seed 3"}
    assert read.evaluation["data"]["max_digits"] == by["gkd seed 3"].evaluation["data"]["max_digits"] == 2
    assert "data" not in {job.title: job for job in plan()}["gkd seed 3"].evaluation

    for job in by.values():
        begin(job)
        finish(job, {"student_tokens": 1})
    assert not any(changes(job) for job in plan(*TRACES, where))
    more = {
        job.title: changes(job)
        for job in plan(*TRACES, where, "stages.traces.overrides=" + TRACES[2].partition("=")[2].replace("9", "8"))
    }
    assert more["traces seed 3"] == ["records.examples: 9 there, 8 now"]
    assert more["read seed 3"] == ["the model of traces seed 3 has changed"]
    assert not more["gkd seed 3"]
