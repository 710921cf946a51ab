"""Samples of a step: groups, facts, probes, monitored text from a writer, the teacher's view; the same on any share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from distill.assembly import assemble
from distill.config import RunConfig, load_config
from distill.data import Example, TokenSequence, build_task, encode_prompt
from distill.errors import ConfigError, DataError
from distill.methods.base import Method, Source, Targets, TextSpec, TokenLosses
from distill.rollouts.rollout import Trajectory
from distill.samples import SampleSource

pytestmark = pytest.mark.unit


class Fake(Method):
    """A method whose every answer is set by the test."""

    Config = TextSpec

    def __init__(self, **answers: Any) -> None:
        self.sources: Sequence[Source] = answers.pop("sources", [Source.STUDENT])
        for name, value in answers.items():
            setattr(self, name, value)

    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        return self.sources[sample % len(self.sources)]

    def uses(self) -> set[Source]:
        return set(self.sources)

    def token_losses(self, targets: Targets) -> TokenLosses:
        raise AssertionError("no losses here")


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[PreTrainedModel]:
    root = tmp_path_factory.mktemp("samples")
    return [AutoModelForCausalLM.from_pretrained(make_model(root / str(seed), seed)).eval() for seed in (1, 2)]


@pytest.fixture(scope="module")
def config(tiny_models: dict[str, Path]) -> RunConfig:
    return load_config("config", ["data.min_terms=2", "train.max_length=64", "rollout.max_new_tokens=12"])


@pytest.fixture
def make_source(config: RunConfig, tiny_models: dict[str, Path], models: list[PreTrainedModel]) -> Callable[..., Any]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["student"])

    def make(method: Method, changed: RunConfig = config) -> SampleSource:
        return SampleSource(changed, build_task(changed.data, "train"), tokenizer, method, models[1])

    return make


def test_a_group_shares_its_prompt_and_differs_in_its_rollouts(
    make_source: Callable[..., SampleSource], models: list[PreTrainedModel]
) -> None:
    source = make_source(Fake(samples_per_prompt=4))
    whole = source.make(range(8, 20), models[0])
    assert [fact.sample for fact in whole.facts] == list(range(8, 20))
    assert [fact.group for fact in whole.facts] == [2] * 4 + [3] * 4 + [4] * 4
    prompts = [tuple(s.ids[: s.prompt_length]) for s in whole.sequences]
    assert len(set(prompts)) == 3
    assert all(len({tuple(s.ids) for s in whole.sequences[i : i + 4]}) > 1 for i in (0, 4, 8))
    plain = make_source(Fake(sources=[Source.REFERENCE])).make(range(2, 5), None)
    assert [tuple(s.ids[: s.prompt_length]) for s in plain.sequences] == prompts[::4]
    # Another rank's share, which cuts through a group.
    parts = [make_source(Fake(samples_per_prompt=4)).make(r, models[0]) for r in (range(8, 14), range(14, 20))]
    assert [s.ids for part in parts for s in part.sequences] == [s.ids for s in whole.sequences]
    assert source.epoch(8 * len(source.task)) == 2.0


def test_facts_say_what_the_text_was(make_source: Callable[..., SampleSource], models: list[PreTrainedModel]) -> None:
    """Two kinds of text in one step; a mask; log-probabilities that the student itself computes from the same ids."""

    def supervise(sequence: TokenSequence, tokenizer: Any) -> TokenSequence:
        return replace(sequence, supervised=[i % 2 == 0 for i in range(len(sequence.response_ids))])

    method = Fake(sources=[Source.STUDENT, Source.REFERENCE], supervise=supervise)
    made = make_source(method).make(range(4), models[0])
    for sequence, fact in zip(made.sequences, made.facts, strict=True):
        assert fact.length == len(sequence.response_ids)
        assert fact.tokens == (fact.length + 1) // 2
    assert [fact.source for fact in made.facts] == [Source.STUDENT, Source.REFERENCE] * 2
    assert [fact.correct for fact in made.facts] == [0.0, None, 0.0, None]
    assert [s.logprobs is None for s in made.sequences] == [False, True] * 2
    assert (made.rollouts, made.generated_tokens) == (2, made.facts[0].length + made.facts[2].length)
    assert (made.student_tokens, made.teacher_tokens) == (made.generated_tokens, 0.0)

    import torch

    sequence = made.sequences[0]
    with torch.no_grad():
        logits = models[0](torch.tensor([sequence.ids])).logits[0, sequence.prompt_length - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(sequence.response_ids)[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(sequence.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_probes_are_the_student_s_pass_rate_and_are_not_trained_on(
    make_source: Callable[..., SampleSource], models: list[PreTrainedModel]
) -> None:
    source = make_source(Fake(sources=[Source.REFERENCE], probe_rollouts=5))
    asked: list[tuple[str, str]] = []
    judge = source._judge
    answers = iter([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0])

    def verdict(example: Example, response: list[int]) -> float:
        asked.append((example.id, source._text(response)))
        assert judge(example, response) == 0.0, "random models do not solve problems"
        return next(answers)

    source._judge = verdict  # type: ignore[method-assign,assignment]
    assert source.needs_student
    made = source.make(range(2), models[0])
    assert [fact.probed for fact in made.facts] == [0.6, 0.2]
    assert [len({text for name, text in asked if name == s.example_id}) > 1 for s in made.sequences] == [True, True]
    assert (made.rollouts, made.generated_tokens) == (0, 0)
    assert made.student_tokens > 0
    assert made.sequences == make_source(Fake(sources=[Source.REFERENCE])).make(range(2), None).sequences


def test_monitored_text_comes_from_the_method_s_writer(
    make_source: Callable[..., SampleSource], models: list[PreTrainedModel]
) -> None:
    class Script:
        made, calls = 0, []

        def __init__(self, student: Any, teacher: Any, tokenizer: Any, config: Any) -> None:
            assert [student, teacher] == models
            Script.made += 1

        def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Trajectory]:
            Script.calls.append((list(map(list, prompts)), list(seeds)))
            notes = {"breach": 1.0, "student_tokens": 7.0, "teacher_tokens": 4.0}
            return [Trajectory([3, 4, 5], [True, False, True], [-1.0, -2.0, -3.0], False, notes) for _ in prompts]

    source = make_source(Fake(sources=[Source.MONITORED], writer=Script))
    made = [source.make(range(2 * step, 2 * step + 2), models[0]) for step in range(2)]
    assert Script.made == 1, "one writer for a run"
    assert len({seed for _, seeds in Script.calls for seed in seeds}) == 4
    assert Script.calls[0][0] == [encode_prompt(source.tokenizer, w.example) for w in source.wanted(range(2))]
    sequence, fact = made[1].sequences[0], made[1].facts[0]
    assert (sequence.response_ids, sequence.supervised, sequence.logprobs) == (
        [3, 4, 5],
        [True, False, True],
        [-1.0, -2.0, -3.0],
    )
    assert (fact.tokens, fact.length, fact.correct, fact.notes["breach"]) == (2, 3, 0.0, 1.0)
    assert (made[1].student_tokens, made[1].teacher_tokens, made[1].finished, made[1].rollouts) == (14.0, 8.0, 0, 2)


def test_the_teacher_s_view_must_leave_room_for_the_response(
    make_source: Callable[..., SampleSource], config: RunConfig, models: list[PreTrainedModel]
) -> None:
    def view(example: Example) -> Example | None:
        repeats = {0: 0, 1: 1, 2: 30}[int(example.id.rpartition("/")[2]) % 3]
        return replace(example, prompt="1+" * repeats + str(example.prompt)) if repeats else None

    method = Fake(sources=[Source.REFERENCE], teacher_view=view)
    skipping = replace(config, data=replace(config.data, on_long="skip"))
    source = make_source(method, skipping)
    source._teacher_context = 64
    made = source.make(range(30), None)
    views = [view(w.example) for w in source.wanted(range(30))]
    fits = [v is None or len(str(v.prompt)) < 50 for v in views]
    assert 0 < made.skipped == fits.count(False) < 30
    for sequence, seen in zip(made.sequences, [v for v, ok in zip(views, fits, strict=True) if ok], strict=True):
        assert sequence.teacher_prompt == (None if seen is None else encode_prompt(source.tokenizer, seen))
    strict = make_source(method)
    strict._teacher_context = 64
    with pytest.raises(DataError, match=r"what the teacher sees has \d+ tokens, the limit is 64"):
        strict.make(range(30), None)


def test_a_step_takes_whole_groups(base_overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size=16 .* 6 samples per prompt .* set train.batch_size=18"):
        assemble(load_config("config", [*base_overrides, "method=grpo", "method.group=6"]))
