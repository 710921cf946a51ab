"""A run with sorted rollouts makes the samples that it makes without, each once, in whole groups, on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill import sorted_samples
from distill.config import RunConfig, load_config
from distill.data import build_task
from distill.data.order import shard
from distill.errors import ConfigError
from distill.methods import build_method
from distill.methods.base import BatchFacts, SequenceFacts, Source
from distill.rollouts.slot_time import SlotTime
from distill.samples import SampleSource, StepSamples
from distill.sorted_samples import SortedSamples, check_schedule, schedule_figures

pytestmark = pytest.mark.unit

STEPS, BATCH = 6, 8
BASE = [
    f"train.steps={STEPS}",
    f"train.batch_size={BATCH}",
    "data.min_terms=2",
    "train.max_length=64",
    "rollout.max_new_tokens=40",
    "rollout.slots=5",
    "rollout.schedule=sorted",
    "rollout.oversubscribe=2",
]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_model(tmp_path_factory.mktemp("sorted") / "1", 1)).eval()


class Run:
    """Sources of ``kind``, each used for one step; the next one is restored from the state that it left."""

    def __init__(self, kind: type[SampleSource], config: RunConfig, tokenizer: Any, model: Any, ranks: int) -> None:
        self.kind, self.config, self.tokenizer, self.model, self.ranks = kind, config, tokenizer, model, ranks
        self.states: dict[int, str] = {}

    def step(self, step: int, rank: int) -> StepSamples:
        config = self.config
        task, method = build_task(config.data, "train"), build_method(config.method)
        source = self.kind(config, task, self.tokenizer, method, self.model)
        if rank in self.states:
            source.restore(json.loads(self.states[rank]))
        share = shard(range(step * BATCH, (step + 1) * BATCH), rank, self.ranks)
        assert isinstance(share, range)
        made = source.make(share, self.model, step / STEPS)
        self.states[rank] = json.dumps(source.state())
        return made


@pytest.mark.parametrize(
    ("method", "ranks"),
    [(["method=on_policy"], 2), (["method=gkd"], 1), (["method=grpo", "method.group=2", "rollout.unfinished=drop"], 2)],
)
def test_a_run_makes_the_same_samples_each_once(
    method: list[str], ranks: int, model: Any, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("config", [*BASE, *method])
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["student"])
    monkeypatch.setattr(sorted_samples, "world_size", lambda: ranks)
    runs = [Run(kind, config, tokenizer, model, ranks) for kind in (SortedSamples, SampleSource)]
    found: dict[int, list[int]] = {}
    expected: dict[int, list[int]] = {}
    moved = False
    for step in range(STEPS):
        for rank in range(ranks):
            monkeypatch.setattr(sorted_samples, "rank", lambda rank=rank: rank)
            made, plain = (run.step(step, rank) for run in runs)
            assert [fact.source for fact in made.facts].count(Source.STUDENT) == [f.source for f in plain.facts].count(
                Source.STUDENT
            )
            assert len(made.sequences) == BATCH // ranks
            for wanted, into in ((made, found), (plain, expected)):
                numbers = [sequence.sample for sequence in wanted.sequences]
                assert numbers == [fact.sample for fact in wanted.facts] == sorted(numbers)
                assert not into.keys() & set(numbers), "a sample came twice"
                into |= {sequence.sample: sequence.ids for sequence in wanted.sequences}
            moved |= [f.sample for f in made.facts] != [f.sample for f in plain.facts]
            groups = BatchFacts(made.facts).groups()
            assert {len(members) for members in groups.values()} == {build_method(config.method).samples_per_prompt}
            assert made.slot_time is not None
            assert made.student_tokens == made.slot_time.busy
    assert found == expected
    assert moved


def test_figures_of_a_step() -> None:
    config = load_config("config", [*BASE, "rollout.max_staleness=2"])
    facts = BatchFacts(
        [
            SequenceFacts(n, n, Source.STUDENT, 3, 3, notes={"staleness": float(age)})
            for n, age in enumerate([0, 0, 2, 1])
        ]
    )
    figures = schedule_figures(config, facts, [SlotTime(2, 4, 6, 5, 1), SlotTime(2, 2, 4, 7, 2), None])
    assert figures == {
        "rollout/bubble": 1 - 10 / 16,
        "rollout/ticks": 4.0,
        "rollout/dropped_tokens": 12.0,
        "rollout/requeued": 3.0,
        "rollout/staleness_mean": 0.75,
        "rollout/staleness_max": 2.0,
        "rollout/stale_0": 2.0,
        "rollout/stale_1": 1.0,
        "rollout/stale_2": 1.0,
    }
    plain = load_config("config", ["rollout.schedule=plain"])
    assert schedule_figures(plain, facts, [SlotTime(2, 4, 6)]) == {"rollout/bubble": 0.25, "rollout/ticks": 4.0}
    assert schedule_figures(config, facts, [None]) == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method=off_policy"],
            "nothing to sort: method=off_policy trains on no text of the student; set rollout.schedule=plain",
        ),
        (["method=motab"], "monitored rollouts, which have a schedule of their own"),
        (["method=grpo", "method.group=3"], "train.batch_size=8 is not a multiple of 3; set train.batch_size=9"),
        (["rollout.max_staleness=0"], "set rollout.max_staleness=1 or more, or rollout.unfinished=drop"),
        (["rollout.oversubscribe=0.5"], "rollout.oversubscribe=0.5 is out of range"),
        (["rollout.unfinished=keep"], "rollout.unfinished=keep is not valid; choose one of: drop, partial"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_samples, "world_size", lambda: 1)

    def start() -> None:
        config = load_config("config", [*BASE, *overrides])
        check_schedule(config, build_method(config.method))

    with pytest.raises(ConfigError, match=message):
        start()
