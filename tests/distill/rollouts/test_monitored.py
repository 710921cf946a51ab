"""Monitored rollouts against the algorithm written out for one trajectory, without caches or batches; then the edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.errors import ConfigError
from distill.rollouts import Generator, SamplingParams
from distill.rollouts.monitored import Monitored, MonitoredTrajectory, MonitorOptions
from distill.rollouts.monitored_trajectory import Marker
from distill.rollouts.sampling import draw, seed_keys, uniforms
from distill.rollouts.session import Session
from distill.seeds import mix

pytestmark = pytest.mark.unit

EOS = 0
SHARED = 61  # ids that both models have
STEP_END = ["w7", "w11", "w23", "w42"]  # about a token in fifteen ends a step
MARKER = "w12 w13"


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """One token per word, ``w3`` to ``w60``."""
    ids = {"<eos>": EOS, "<pad>": 1, "<bos>": 2, **{f"w{i}": i for i in range(3, SHARED)}}
    core = Tokenizer(models.WordLevel(ids, "<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")


@dataclass
class Naive:
    """The algorithm as the paper writes it, one trajectory at a time, a full uncached forward per token."""

    student: Any
    teacher: Any
    options: MonitorOptions
    params: SamplingParams
    context: int
    prompt: list[int]
    seed: int
    accepted: list[int] = field(default_factory=list)
    text: list[tuple[int, bool, str]] = field(default_factory=list)  # token, supervised, who
    steps: list[tuple[list[int], float, float, float]] = field(default_factory=list)
    takeovers: list[tuple[int, int, int]] = field(default_factory=list)

    @torch.no_grad()
    def logits(self, model: Any, ids: list[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    def write(self, model: Any, seed: int, limit: int, ends: set[int]) -> tuple[list[int], list[float]]:
        ids, logprobs = [], []
        while len(ids) < limit and not (ids and (ids[-1] == EOS or ids[-1] in ends)):
            state = self.prompt + self.accepted + ids
            uniform = torch.from_numpy(uniforms(seed_keys([seed]), np.array([len(state)])))
            token, logprob = draw(self.logits(model, state)[-1:, :SHARED], self.params, uniform)
            ids.append(int(token))
            logprobs.append(float(logprob))
        return ids, logprobs

    def verdict(self, ids: list[int], ours: list[float]) -> tuple[float, float, float]:
        state = self.prompt + self.accepted
        scores = self.logits(self.teacher, state + ids)[len(state) - 1 : -1].double().log_softmax(-1)
        theirs = [float(row[token]) for row, token in zip(scores, ids)]
        top = scores[0].topk(min(self.options.top_k, len(scores[0]))).values
        top = top - top.logsumexp(0)
        entropy = -float((top.exp() * top).sum())
        value = {
            "geometric_mean": math.exp(sum(theirs) / len(ids)),
            "minimum": math.exp(min(theirs)),
            "student_ratio": sum(map(math.exp, theirs)) / sum(map(math.exp, ours)),
        }[self.options.value]
        return value, self.options.epsilon * math.exp(-self.options.theta * entropy), entropy

    def left(self) -> int:
        return min(self.params.max_new_tokens - len(self.accepted), self.context - len(self.prompt) - len(self.text))

    def run(self) -> Naive:
        o, first, ends = self.options, 0, {int(word[1:]) for word in self.options.delimiters}
        while True:
            seed = mix(self.seed, 31, len(self.takeovers)) if self.takeovers else self.seed
            ids, ours = self.write(self.student, seed, min(o.step_tokens, self.left()), ends)
            value, limit, entropy = self.verdict(ids, ours)
            self.steps.append((ids, value, limit, entropy))
            if value > limit or (value == limit and o.value != "student_ratio"):
                self.accepted += ids
                self.text += [(token, True, "student") for token in ids]
                if ids[-1] == EOS or self.left() < 1:
                    return self
                continue
            t = len(self.steps) - 1
            back = t
            if o.rewind == "drop" and t > first:
                back = min(range(first + 1, t + 1), key=lambda k: self.steps[k][1] - self.steps[k - 1][1])
            dropped = sum(len(step[0]) for step in self.steps[back:t])
            kept = len(self.accepted) - dropped
            start = len(self.text) - dropped
            text = self.text[:start]
            if o.keep_flawed:
                flawed = [token for step in self.steps[back:] for token in step[0] if token != EOS]
                text += [(token, not o.mask_flawed, "student") for token in flawed]
                text += [(int(word[1:]), True, "marker") for word in MARKER.split()]
            room = self.context - len(self.prompt) - len(text)
            if room < 1:
                self.accepted += ids
                self.text += [(token, True, "student") for token in ids]
                self.takeovers.append((t + 1, back + 1, 0))
                return self
            self.accepted, self.text = self.accepted[:kept], text
            last = 0 < o.max_breaches <= len(self.takeovers) + 1
            budget = self.params.max_new_tokens - kept
            budget = max(budget, o.suffix_floor) if last else min(budget, o.step_tokens)
            seed = mix(self.seed, 32, len(self.takeovers))
            ids, _ = self.write(self.teacher, seed, min(budget, room), set() if last else ends)
            self.takeovers.append((t + 1, back + 1, len(ids)))
            self.accepted += ids
            self.text += [(token, True, "teacher") for token in ids]
            first = len(self.steps)
            if last or ids[-1] == EOS or self.left() < 1:
                return self


def pair(tiny: Any) -> tuple[Any, Any]:
    """A student, and a teacher that mostly agrees with it (its weights, shaken) and has three more ids in its vocabulary."""
    student, teacher = tiny(seed=1), tiny(seed=1)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weights in teacher.parameters():
            weights.add_(torch.randn(weights.shape, generator=noise) * 0.05)
    torch.manual_seed(0)  # of the new rows
    teacher.resize_token_embeddings(SHARED + 3, mean_resizing=False)
    return student, teacher


def prompts(count: int) -> list[list[int]]:
    return [[3 + (5 * i + j) % 50 for j in range(1 + i % 6)] for i in range(count)]


def options(**changes: Any) -> MonitorOptions:
    values: dict[str, Any] = {
        "epsilon": 0.03, "theta": 0.5, "delimiters": STEP_END, "step_tokens": 9, "marker": MARKER, "top_k": 10
    }  # fmt: skip
    return MonitorOptions(**(values | changes))


def same(got: MonitoredTrajectory, want: Naive) -> None:
    assert got.ids == [token for token, _, _ in want.text]
    assert got.accepted_ids == want.accepted
    flags = [flag for _, flag, _ in want.text]
    assert (got.supervised or [True] * len(got.ids)) == flags
    assert [step.ids for step in got.steps] == [step[0] for step in want.steps]
    figures = [(step.value, step.boundary, step.entropy) for step in got.steps]
    assert np.array(figures) == pytest.approx(np.array([step[1:] for step in want.steps]), rel=1e-3, abs=1e-7)
    assert [(t.step, t.rewound_to, t.tokens) for t in got.takeovers] == want.takeovers
    by = [who for _, _, who in want.text if who != "marker"]
    assert got.teacher_share == pytest.approx(by.count("teacher") / len(by))


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "masked": {"mask_flawed": True, "epsilon": 0.05},
    "dropped": {"keep_flawed": False, "epsilon": 0.05},
    "minimum": {"value": "minimum", "epsilon": 0.003},
    "three breaches": {"max_breaches": 3, "mask_flawed": True, "epsilon": 0.05},
    "no limit": {"max_breaches": 0, "keep_flawed": False},
    "skd": {
        "value": "student_ratio", "epsilon": 0.9, "theta": 0.0, "max_breaches": 0, "keep_flawed": False, "rewind": "step"
    },
    "floor": {"suffix_floor": 60, "epsilon": 0.05},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_agrees_with_the_algorithm_written_out(tiny: Any, words: Any, name: str) -> None:
    student, teacher = pair(tiny)
    chosen, params = options(**VARIANTS[name]), SamplingParams(max_new_tokens=40, temperature=0.8)
    asked = prompts(14)
    engine = Monitored(student, teacher, words, chosen, params, slots=5, context_length=80)
    got = engine.generate(asked, range(100, 114))
    want = [
        Naive(student, teacher, chosen, params, 80, prompt, seed).run() for prompt, seed in zip(asked, range(100, 114))
    ]
    for mine, theirs in zip(got, want):
        same(mine, theirs)
    breached = [bool(naive.takeovers) for naive in want]
    assert any(breached)  # the case is worth its name
    if name in ("paper", "minimum"):
        assert not all(breached)
    if chosen.rewind == "drop":
        assert any(step > back for naive in want for step, back, _ in naive.takeovers)


def run(tiny: Any, words: Any, chosen: MonitorOptions, *, student: Any = None, teacher: Any = None, **how: Any) -> Any:
    """``(engine, trajectories)`` of 12 prompts at temperature 0.8."""
    ours, theirs = pair(tiny)
    values: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.8, "slots": 5, "context_length": 80} | how
    asked = values.pop("asked", prompts(12))
    slots, context = values.pop("slots"), values.pop("context_length")
    engine = Monitored(
        student or ours, teacher or theirs, words, chosen, SamplingParams(**values), slots=slots, context_length=context
    )
    return engine, engine.generate(asked, range(100, 100 + len(asked)))


def whole(found: Sequence[MonitoredTrajectory]) -> list[Any]:
    """What must not depend on the batch; figures apart."""
    return [(one.ids, one.supervised, one.accepted_ids, one.takeovers, [s.ids for s in one.steps]) for one in found]


@pytest.mark.parametrize("name", ["paper", "three breaches", "skd"])
def test_any_number_of_slots_and_any_order_give_the_same_trajectories(tiny: Any, words: Any, name: str) -> None:
    chosen, asked = options(**VARIANTS[name]), prompts(7)
    _, alone = run(tiny, words, chosen, asked=asked, slots=1)
    for slots in (3, 64):
        assert whole(run(tiny, words, chosen, asked=asked, slots=slots)[1]) == whole(alone)
    student, teacher = pair(tiny)
    engine = Monitored(
        student, teacher, words, chosen, SamplingParams(max_new_tokens=40, temperature=0.8), slots=4, context_length=80
    )
    backwards = engine.generate(asked[::-1], range(106, 99, -1))
    assert whole(backwards[::-1]) == whole(alone)
    streamed = dict(engine.stream(asked, range(100, 107)))
    assert whole([streamed[i] for i in range(7)]) == whole(alone)


def test_without_a_breach_the_trajectory_is_the_plain_rollout(tiny: Any, words: Any) -> None:
    student, _ = pair(tiny)
    asked = [*prompts(10), [9, 9], [9, 9], [9, 9]]  # equal prompts share a prefill
    engine, got = run(tiny, words, options(epsilon=0.0), asked=asked)
    params = SamplingParams(max_new_tokens=40, temperature=0.8)
    plain = Generator(student, words, slots=5, context_length=80).generate(asked, params, range(100, 113))
    assert [one.ids for one in got] == [one.response_ids for one in plain]
    assert [one.finish for one in got] == [one.finish for one in plain]
    for one in got:
        assert one.accepted_ids == one.ids == [token for step in one.steps for token in step.ids]
        assert (one.takeovers, one.supervised, one.teacher_share, one.notes["breach"]) == ([], None, 0.0, 0.0)
        assert "rewind" not in one.notes
    assert engine.usage.teacher_tokens == 0
    assert engine.usage.student_tokens == engine.usage.judged_tokens == sum(len(one.ids) for one in got)


def test_a_teacher_that_is_the_student_never_steps_in(tiny: Any, words: Any) -> None:
    student = tiny(seed=1, initializer_range=2.0)  # certain of what it writes
    _, greedy = run(tiny, words, options(epsilon=0.2, theta=1.0), student=student, teacher=student, temperature=0.0)
    assert not any(one.takeovers for one in greedy)
    skd = options(**VARIANTS["skd"])
    _, sampled = run(tiny, words, skd, teacher=pair(tiny)[0])
    assert not any(one.takeovers for one in sampled)
    assert {round(step.value, 4) for one in sampled for step in one.steps} == {1.0}


def test_a_breach_at_the_first_step_leaves_nothing_of_the_student(tiny: Any, words: Any) -> None:
    strict = options(epsilon=2.0, theta=0.0, keep_flawed=False)
    _, got = run(tiny, words, strict)
    for one in got:
        assert [(t.step, t.rewound_to) for t in one.takeovers] == [(1, 1)]
        assert one.teacher_share == 1.0
        assert one.ids == one.accepted_ids
        assert one.takeovers[0].tokens == len(one.ids)
        assert one.notes["rewind"] == 0.0
    _, kept = run(tiny, words, options(epsilon=2.0, theta=0.0, mask_flawed=True))
    for one, other in zip(kept, got):
        flawed = [token for token in one.steps[0].ids if token != EOS]
        assert one.ids == [*flawed, 12, 13, *other.ids]
        assert one.accepted_ids == other.ids
        assert one.supervised == [False] * len(flawed) + [True] * (2 + len(other.ids))


@pytest.mark.parametrize("name", ["paper", "dropped", "three breaches", "skd"])
def test_rewinding_recomputes_no_prefix(tiny: Any, words: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens fed to each model equal the arithmetic: what is fed twice is one token per rewind, for its logits."""
    fed: dict[int, int] = {}
    made: list[Any] = []
    init = Session.__init__

    def counting(self: Session, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        number, forward = len(made), self._forward
        made.append(self)

        def count(chunk: Any, cache: Any, *, logits: bool) -> Any:
            fed[number] = fed.get(number, 0) + len(chunk.ids)
            return forward(chunk, cache, logits=logits)

        self._forward = count  # type: ignore[method-assign]

    monkeypatch.setattr(Session, "__init__", counting)
    asked = [[3 + i, 4 + i, 5 + i] for i in range(12)]  # no two share a prefill
    _, got = run(tiny, words, options(**VARIANTS[name]), asked=asked)
    assert any(one.takeovers for one in got)
    student = teacher = 0
    for prompt, one in zip(asked, got):
        written = sum(len(step.ids) for step in one.steps)
        # Each token once, but for the last, which nobody follows. To the student come the teacher's tokens where it goes on
        # behind them (a later step was judged); the one before t* it still holds.
        student += len(prompt) - 1 + written + sum(t.tokens - 1 for t in one.takeovers if t.step < len(one.steps))
        # The teacher reads the token before t* again, to write what follows it, and its own but the last.
        teacher += len(prompt) - 1 + written + sum(t.tokens for t in one.takeovers)
    assert len(made) == 2
    assert fed[0] == student
    assert fed[1] == teacher


def test_a_rewound_row_draws_anew(tiny: Any, words: Any) -> None:
    """With the teacher's weights in both places and one step per takeover, the same seed would only repeat the step."""
    student, _ = pair(tiny)
    chosen = options(epsilon=2.0, theta=0.0, max_breaches=0, keep_flawed=False, rewind="step", step_tokens=4)
    _, got = run(tiny, words, chosen, student=student, teacher=student)
    rejected = [step.ids for one in got for step in one.steps]
    placed = [one.ids for one in got]
    assert all(one.ids == one.accepted_ids for one in got)
    assert sum(one.ids[: len(one.steps[0].ids)] == one.steps[0].ids for one in got) <= 2
    assert len(rejected) > len(placed)


def test_steps_that_never_end_are_cut_and_judged(tiny: Any, words: Any) -> None:
    never = options(epsilon=0.0, delimiters=["w59 w59 w59"], step_tokens=6)
    _, got = run(tiny, words, never)
    assert any(len(one.steps) > 3 for one in got)
    for one in got:
        assert [len(step.ids) for step in one.steps[:-1]] == [6] * (len(one.steps) - 1)
        assert one.finish == ("eos" if one.ids[-1] == EOS else "length")
        assert one.finished == (one.finish == "eos")


def test_an_end_token_ends_the_trajectory_and_a_delimiter_does_not(tiny: Any, words: Any) -> None:
    _, got = run(tiny, words, options(epsilon=0.0))
    ends = {int(word[1:]) for word in STEP_END}
    assert any(one.ids[-1] == EOS for one in got)
    for one in got:
        assert EOS not in one.ids[:-1]
        for step in one.steps[:-1]:
            assert step.ids[-1] in ends or len(step.ids) == 9
            assert not ends & set(step.ids[:-1])


def test_stop_strings_of_the_caller_end_the_trajectory(tiny: Any, words: Any) -> None:
    _, got = run(tiny, words, options(epsilon=0.0), stop=("w7",))
    stopped = [one for one in got if one.finish == "stop"]
    assert stopped
    assert all(one.ids[-1] == 7 and 7 not in one.ids[:-1] for one in stopped)
    assert all(7 not in one.ids for one in got if one.finish != "stop")


@pytest.mark.parametrize(("size", "words_left"), [(79, 1), (78, 2), (75, 5)])
def test_a_prompt_that_almost_fills_the_context(tiny: Any, words: Any, size: int, words_left: int) -> None:
    asked = [[3 + (i + j) % 50 for j in range(size)] for i in range(4)]
    for changes in (
        {"epsilon": 0.0},
        {"epsilon": 2.0, "theta": 0.0},
        {"epsilon": 2.0, "theta": 0.0, "keep_flawed": False},
    ):
        _, got = run(tiny, words, options(**changes), asked=asked)
        for one in got:
            assert 1 <= len(one.ids) <= words_left
            assert len(one.supervised or one.ids) == len(one.ids)
            flawed_stays = "theta" in changes and "keep_flawed" not in changes and size > 75
            assert one.notes["uncorrected"] == (1.0 if flawed_stays else 0.0) or size == 75
            if one.notes["uncorrected"]:  # no room for flaw, marker and correction: the student's text stands
                assert one.ids == one.steps[0].ids
                assert one.notes["breach"] == 1.0


def test_a_teacher_without_room_in_its_prefill_budget_reads_in_pieces(
    tiny: Any, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = run(tiny, words, options())
    monkeypatch.setattr("distill.rollouts.monitored_teacher._NUMBERS", 7 * (SHARED + 3))
    _, got = run(tiny, words, options())
    assert whole(got) == whole(expected)
    for one, other in zip(got, expected):
        assert [s.value for s in one.steps] == pytest.approx([s.value for s in other.steps], rel=1e-4)
        assert [s.entropy for s in one.steps] == pytest.approx([s.entropy for s in other.steps], rel=1e-4)


def test_notes_and_usage(tiny: Any, words: Any) -> None:
    engine, got = run(tiny, words, options(**VARIANTS["masked"]))
    assert engine.usage.student_tokens == sum(one.notes["student_tokens"] for one in got)
    assert engine.usage.teacher_tokens == sum(one.notes["teacher_tokens"] for one in got)
    assert 0.0 < engine.usage.student_s + engine.usage.teacher_s <= engine.usage.wall_s
    for one in got:
        assert one.notes["value"] == pytest.approx(sum(s.value for s in one.steps) / len(one.steps))
        assert 0.0 <= one.notes["student_idle"] <= 1.0
        assert one.notes["teacher_tokens_per_s"] > 0
        if one.takeovers:
            assert one.notes["rewind"] == one.takeovers[0].step - one.takeovers[0].rewound_to


def test_marker_repeats_no_white_space(text_tokenizers: Any) -> None:
    tokenizer = text_tokenizers["byte_level"]
    marker = Marker(tokenizer, "\n\nHowever,\n\n")
    for text, expected in (
        ("First step.\n\n", "However,\n\n"),
        ("First step.\n", "\nHowever,\n\n"),
        ("First st", "\n\nHowever,\n\n"),
    ):
        assert tokenizer.decode(marker.after(tokenizer.encode(text))) == expected
    assert Marker(tokenizer, "").after([5, 6]) == []


def test_misuse_is_refused(tiny: Any, words: Any) -> None:
    student, teacher = pair(tiny)
    with pytest.raises(ConfigError, match=r"method.marker='However,' cannot be written"):
        Monitored(student, teacher, words, options(marker="However,"), SamplingParams())
    with pytest.raises(ConfigError, match=r"method.delimiters=\[''\]"):
        options(delimiters=[""])
    with pytest.raises(ConfigError, match="nothing to mask"):
        options(mask_flawed=True, keep_flawed=False)
    with pytest.raises(ConfigError, match=r"method.value=mean"):
        options(value="mean")
    engine = Monitored(student, teacher, words, options(), SamplingParams(), context_length=20)
    assert engine.generate([], []) == []
    with pytest.raises(ValueError, match="1 prompts but 2 seeds"):
        engine.generate([[5]], [1, 2])
    for prompt in ([], [5] * 20):
        with pytest.raises(ValueError, match=f"prompt 1 has {len(prompt)} tokens"):
            engine.generate([[5], prompt], [1, 2])


def test_a_teacher_that_is_not_finite_stops_the_run(tiny: Any, words: Any) -> None:
    student, teacher = pair(tiny)
    with torch.no_grad():
        teacher.lm_head.weight[5] = math.nan
    with pytest.raises(FloatingPointError, match="teacher's logits are not finite"):
        run(tiny, words, options(), student=student, teacher=teacher)
    assert student.training is False
