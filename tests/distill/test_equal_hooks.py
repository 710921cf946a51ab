"""One method that uses every hook: its step against fp64 one sequence at a time, and the same in every layout.

Groups cross ranks and micro-batches, some sequences have no supervised token, once a whole rank has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from distill.kernels import divergence, token_logprobs
from harness import Rank, RankPool

from distill.data import Example, TokenSequence
from distill.methods.base import BatchFacts, Method, Source, Targets, TextSpec, TokenLosses, Weight

pytestmark = pytest.mark.dist

BATCH, GROUP, STEPS = 24, 8, 4
AGGREGATIONS = {
    "token_mean": [],
    "sequence_mean": [],
    "constant": ["train.aggregation.constant=13"],
    "delta_l": ["train.aggregation.alpha=0.75"],
}
LAYOUTS = {
    "1 rank, accumulation 3, padded": (1, "train.micro_batch_size=8", "train.pack=false"),
    "2 ranks": (2, "train.micro_batch_size=12", "train.pack=true"),
    "2 ranks, accumulation 6": (2, "train.micro_batch_size=2", "train.pack=true"),
    "2 ranks, ZeRO-3": (2, "train.micro_batch_size=4", "engine.zero_stage=3"),
}
THOROUGH = ("token_mean", "delta_l")  # the others share their code but for one line each


class Everything(Method):
    Config = TextSpec
    needs = frozenset({"teacher", "reference"})
    samples_per_prompt = GROUP
    self_teacher = 2
    draws = True

    def __init__(self, config: TextSpec) -> None:
        self.config = config

    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        return Source.REFERENCE if sample // GROUP % 3 == 1 else Source.STUDENT

    def uses(self) -> set[Source]:
        return {Source.STUDENT, Source.REFERENCE}

    def supervise(self, sequence: TokenSequence, tokenizer: Any) -> TokenSequence:
        sample, count = sequence.sample, len(sequence.response_ids)
        nothing = sample % 5 == 0 or sample // 12 == 3  # the second half of the second step
        return replace(sequence, supervised=[not nothing and (sample % 3 > 0 or i % 2 == 0) for i in range(count)])

    def teacher_view(self, example: Example) -> Example | None:
        return replace(example, prompt=f"1+{example.prompt}")

    def weigh(self, facts: BatchFacts) -> Sequence[Weight]:
        rates = [rate or 0.0 for rate in facts.pass_rates()]
        longest = max(sequence.length for sequence in facts.sequences)
        return [
            Weight(0.25 + rate + sequence.length / longest, (sequence.correct or 0.0) - rate)
            for rate, sequence in zip(rates, facts.sequences, strict=True)
        ]

    def token_losses(self, targets: Targets) -> TokenLosses:
        assert targets.teacher_logits is not None
        assert targets.reference_logits is not None
        teacher = divergence(targets.student_logits, targets.teacher_logits, kind="reverse_kl", stats=True)
        reference = divergence(targets.student_logits, targets.reference_logits, kind="forward_kl").loss
        logprob = token_logprobs(targets.student_logits, targets.token_ids.unsqueeze(-1))[0].squeeze(-1)
        ratio = (logprob - targets.behaviour_logprobs.nan_to_num(-3.0)).exp()  # type: ignore[union-attr]
        loss = teacher.loss + (reference + 1.0) * targets.draws - (1.0 - targets.progress) * ratio * targets.advantages
        return TokenLosses(loss, dict(teacher.stats))


def even_length(self: Any, example: Any, response: str) -> Any:
    """A verdict that random models earn now and then."""
    from distill.data import Verdict

    return Verdict(len(response) % 2 == 0, None)


def run_rows(me: Rank, overrides: list[str]) -> list[dict[str, float]]:
    """Every figure of every step but times."""
    from distill.config import load_config
    from distill.data.running_sum import RunningSum
    from distill.methods import METHODS
    from distill.metrics import read_metrics
    from distill.train import train

    me.init("ncclx")
    config = load_config("config", overrides)
    with patch.dict(METHODS, everything=Everything), patch.object(RunningSum, "verify", even_length):
        train(config)
    rows = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("perf/") and "per_s" not in k} for row in rows]


def first_loss(me: Rank, overrides: list[str]) -> float:
    """The loss of step 1 in fp64: one sequence at a time through Hugging Face, formulas written out."""
    from distill.assembly import assemble
    from distill.config import load_config
    from distill.data import encode_prompt
    from distill.data.running_sum import RunningSum
    from distill.methods import METHODS
    from distill.preparing import DRAWS
    from distill.rollouts.sampling import seed_keys, uniforms
    from distill.samples import SampleSource
    from distill.seeds import mix

    me.init("ncclx")
    config = load_config("config", overrides)
    with patch.dict(METHODS, everything=Everything), patch.object(RunningSum, "verify", even_length):
        parts = assemble(config)
        source = SampleSource(config, parts.task, parts.tokenizer, parts.method, None)
        made = source.make(range(BATCH), parts.student)  # type: ignore[arg-type]
    model = parts.student.double().eval()
    rows, rates = list(zip(made.sequences, made.facts, strict=True)), {}
    for group in range(BATCH // GROUP):
        judged = [f.correct for _, f in rows if f.sample // GROUP == group and f.correct is not None]
        rates[group] = sum(judged) / len(judged) if judged else 0.0
    longest = max(len(s.response_ids) for s, _ in rows)
    lengths = [sum(s.supervised or []) for s, _ in rows]
    counted, total = [n for n in lengths if n], 0.0
    kind, aggregation = config.train.aggregation.kind, config.train.aggregation
    for (s, f), wanted, length in zip(rows, source.wanted(range(BATCH)), lengths, strict=True):
        if not length:
            continue
        with torch.no_grad():
            q = model(torch.tensor([s.ids])).logits[0, s.prompt_length - 1 : -1].log_softmax(-1)
            view = encode_prompt(parts.tokenizer, replace(wanted.example, prompt=f"1+{wanted.example.prompt}"))
            seen = torch.tensor([[*view, *s.response_ids]])
            p = model(seen).logits[0, len(view) - 1 : -1].log_softmax(-1)  # the self-teacher is the student itself
        ids = torch.tensor(s.response_ids)
        logprob = q.gather(1, ids[:, None]).squeeze(1)
        behaviour = torch.full_like(logprob, -3.0) if s.logprobs is None else logprob  # written by these same weights
        places = torch.arange(s.prompt_length - 1, len(s.ids) - 1)
        draws = torch.from_numpy(uniforms(seed_keys([mix(config.seed, DRAWS, f.sample)]), places.numpy()))
        advantage = (f.correct or 0.0) - rates[f.sample // GROUP]
        tokens = (q.exp() * (q - p)).sum(-1) + draws - (logprob - behaviour).exp() * advantage
        weight = 0.25 + rates[f.sample // GROUP] + len(ids) / longest
        coefficient = {
            "token_mean": 1 / sum(counted),
            "sequence_mean": 1 / len(counted) / length,
            "constant": 1 / len(counted) / 13,
            "delta_l": length**-0.75 / sum(n**-0.75 for n in counted) / config.rollout.max_new_tokens,
        }[kind]
        assert aggregation.constant in (None, 13)
        total += coefficient * weight * float(tokens[torch.tensor(s.supervised)].sum())
    assert 0 < len(counted) < BATCH
    return total


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_a_step_is_its_definition_in_every_layout(
    kind: str, base_overrides: list[str], one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    common = [
        *base_overrides, "method=sft", "method.name=everything", f"train.batch_size={BATCH}", f"train.steps={STEPS}",
        f"train.aggregation.kind={kind}", *AGGREGATIONS[kind], "monitor.baseline_steps=1", "monitor.length_growth=1",
        "monitor.entropy_share=1000", "eval.every=2", "eval.examples=6", "engine.lr=0.01",
    ]  # fmt: skip
    whole = [*common, "train.micro_batch_size=24", f"run.dir={tmp_path}/whole"]
    reference = one_rank.run(run_rows, whole)[0]
    assert len(reference) == STEPS + 1
    assert reference[1]["train/loss"] == pytest.approx(one_rank.run(first_loss, whole)[0], rel=1e-5)
    assert reference[-1]["alarm/entropy_collapse"] == 1.0
    for number, (name, (ranks, *layout)) in enumerate(LAYOUTS.items()):
        if kind not in THOROUGH and "accumulation 6" not in name:
            continue
        pool = one_rank if ranks == 1 else two_ranks
        rows = pool.run(run_rows, [*common, *layout, f"run.dir={tmp_path}/{number}"])[0]
        for expected, found in zip(reference, rows, strict=True):
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert math.isfinite(value), f"{name}, step {expected['step']}, {key}"
                close = pytest.approx(value, rel=1e-3 if key == "monitor/grad_snr" else 2e-5, abs=2e-6)
                assert found[key] == close, f"{name}, step {expected['step']}, {key}"
