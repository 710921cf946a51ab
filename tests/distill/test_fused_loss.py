"""Losses from hidden states: the numbers of the path through logits, in memory that does not follow them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from harness import Rank, RankPool
from torch import Tensor

from distill.config import load_config
from distill.data import TokenSequence, collate
from distill.errors import ConfigError
from distill.loss_path import LOGITS, LossPath, choose_loss_path
from distill.methods import METHODS, build_method
from distill.methods.base import KINDS, DivergenceSpec, StudentSignal, Targets
from distill.student_losses import StudentLosses
from distill.teachers.frozen import FrozenModel

SMALL = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
}
SEQUENCES = [TokenSequence([3, 4, 5, 6, 7, 8], 2, "a"), TokenSequence([9, 3, 4, 17, 2], 1, "b")]


def model(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in SMALL.items() if kind != "cohere" or key != "head_dim"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**values, **ARCHITECTURES[kind], **changes}))


def losses_and_gradients(path: LossPath, student: Any, teacher: FrozenModel, method: Any, batch: Any) -> list[Tensor]:
    """Losses, figures and all parameters' gradients of a micro-batch, as the trainer forms them."""
    student.zero_grad()
    scales = torch.linspace(0.0, 2.0, len(batch.target_ids))
    stats: dict[str, Tensor] = {}

    def score(signal: StudentSignal) -> Tensor:
        kind = "hidden" if path.fused else "logits"
        targets = Targets(signal, teacher.signal(batch, kind, 5), batch.target_ids, scales=scales)
        losses = method(targets)
        stats.update(losses.stats)
        return losses.loss

    loss = StudentLosses(student, path, None)(batch, score)
    ((loss * scales).sum() / 7.0 if len(loss) else loss.sum() * 0.0).backward()
    return [loss.detach(), *stats.values(), *(p.grad for p in student.parameters())]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("kind", "architecture"), [*((kind, "qwen3") for kind in KINDS), *(("jsd", name) for name in ARCHITECTURES)]
)
def test_every_divergence_and_architecture_equals_the_path_through_logits(kind: str, architecture: str) -> None:
    torch.manual_seed(0)
    student, teacher = model(architecture).train(), FrozenModel(model(architecture, hidden_size=24, head_dim=12))
    spec = DivergenceSpec(kind=kind, temperature=1.5, top_k=3)
    fused = LossPath(True, 3 * 2 * 4 * SMALL["vocab_size"], "three tokens at a time")
    for sequences in (SEQUENCES, []):
        batch = collate(sequences, 0, 16)
        found = losses_and_gradients(fused, student, teacher, spec, batch)
        expected = losses_and_gradients(LOGITS, student, teacher, spec, batch)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-6)


def choice(*overrides: str) -> LossPath:
    config = load_config("config", [*overrides, "train.max_length=64", "train.micro_batch_size=4"])
    return choose_loss_path(config, build_method(config.method), model("qwen3"))


@pytest.mark.unit
def test_auto_takes_hidden_states_where_logits_would_be_large() -> None:
    large, small = (f"train.loss_bytes={4 * 64 * 20 * 4 - more}" for more in (1, 0))
    hidden = "teacher.signal=hidden"
    assert choice("method=off_policy", hidden, large).fused
    assert not choice("method=off_policy", hidden, small).fused
    assert choice("method=sft", large).fused
    for obstacle in (["method=off_policy"], ["method=akl", hidden], ["method=hpd", hidden], ["method=gopd", hidden]):
        path = choice(*obstacle, large)
        assert not path.fused
        assert "logits" in str(path)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=akl", "teacher.signal=hidden", "train.loss_path=fused"], "method=akl .* reads the student's logits"),
        (["method=gkd", "train.loss_path=fused"], "set teacher.signal=hidden"),
        (["method=sft", "engine.vocab_parallel=2"], "method=sft .* needs more of the student than a divergence"),
        (["method=gkd", "teacher.signal=topk", "engine.vocab_parallel=2"], "set teacher.signal=hidden"),
        (["method=gkd", "teacher.signal=hidden", "engine.vocab_parallel=2", "train.loss_path=logits"], "=auto"),
        (["method=gkd", "teacher.signal=hidden", "engine.vocab_parallel=2", "method.divergence.top_k=5"], "top_k=0"),
        (["method=gkd", "teacher.signal=hidden", "engine.vocab_parallel=2", "+teacher.many.a.path=x"], "in place of"),
        (["train.loss_path=some"], "choose one of: auto, fused, logits"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choice(*overrides)


@pytest.mark.unit
def test_every_method_says_what_it_reads() -> None:
    for name, method in METHODS.items():
        reads = build_method({"name": name}).reads
        assert reads, method
        assert reads <= {"divergence", "tokens", "logits"}


def run_steps(me: Rank, overrides: list[str]) -> tuple[list[tuple[float, float]], dict[str, np.ndarray]]:
    """(loss, gradient norm) of every step of one run, and the weights that it ends with."""
    from transformers import AutoModelForCausalLM

    from distill import engine
    from distill.metrics import read_metrics
    from distill.train import train

    deepspeed_config = engine.deepspeed_config

    def nothing_stays(*arguments: Any) -> dict[str, Any]:
        """ZeRO-3 would keep parameters as small as these whole on every rank, and gather nothing."""
        made = deepspeed_config(*arguments)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    me.init("ncclx")
    config = load_config("config", overrides)
    with mock.patch.object(engine, "deepspeed_config", nothing_stays):
        summary = train(config)
    asked = config.train.loss_path == "fused" or config.engine.vocab_parallel > 1
    assert summary["loss_path"].startswith("hidden states" if asked else "logits")
    folder = Path(config.run.dir)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]
    figures = [(row["train/loss"], row["train/grad_norm"]) for row in rows]
    model = AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.float32)
    return figures, {name: p.detach().numpy() for name, p in model.named_parameters()}


def assert_same_run(found: Any, expected: Any, rel: float, name: str) -> None:
    for step, (ours, theirs) in enumerate(zip(found[0], expected[0], strict=True), 1):
        assert ours == pytest.approx(theirs, rel=rel), f"{name}, step {step}"
    for key, value in expected[1].items():
        np.testing.assert_allclose(found[1][key], value, rtol=1e-3, atol=min(30 * rel, 0.01), err_msg=f"{name}: {key}")


@pytest.mark.dist
def test_training_is_the_same_on_every_zero_stage(
    base_overrides: list[str], two_ranks: RankPool, tmp_path: Path
) -> None:
    """Chunks of one token, accumulation, empty micro-batches (most samples are too long), weights per token."""
    common = [*base_overrides, "teacher.signal=hidden", "train.steps=3", "train.aggregation.kind=sequence_mean"]
    common += ["train.micro_batch_size=2", "data.on_long=skip", "train.max_length=40", "data.max_terms=9"]
    expected = {
        method: two_ranks.run(run_steps, [*common, *options, f"run.dir={tmp_path}/{method}"])[0]
        for method, options in {"gkd": ["method=gkd"], "sft": ["method=sft"]}.items()
    }
    fused = ["train.loss_path=fused", "train.loss_bytes=136"]
    cases = {stage: ["method=gkd", f"engine.zero_stage={stage}"] for stage in (0, 2, 3)}  # 1 and 2 share their code
    cases[3].append("engine.activation_checkpointing=true")
    for stage, options in [*cases.items(), (3, ["method=sft", "engine.zero_stage=3"])]:
        method = options[0].removeprefix("method=")
        folder = f"run.dir={tmp_path}/{method}-{stage}"
        found = two_ranks.run(run_steps, [*common, *fused, *options, folder])[0]
        assert_same_run(found, expected[method], 1e-5, f"{method}, ZeRO-{stage}")


MEMORY = """
import torch
from distill.data.batch import TokenBatch
from distill.kernels.bench_memory import peak_above
from distill.loss_path import LOGITS, LossPath
from distill.methods.base import DivergenceSpec, Targets
from distill.student_losses import StudentLosses
from distill.teachers.frozen import FrozenModel
from transformers import Qwen3Config, Qwen3ForCausalLM

T, BUDGET = 512, 4 * 2**20

def make(vocabulary):
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True))

def peak(vocabulary, tokens, path):
    student, teacher = make(vocabulary), FrozenModel(make(vocabulary))
    ids = torch.arange(tokens)[None]
    places = torch.stack((torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens)), 1)
    batch = TokenBatch(ids, ids, None, places, ids[0], torch.zeros(tokens, dtype=torch.int64), torch.empty(tokens), ["a"])
    scales = torch.ones(tokens)

    def score(signal):
        theirs = teacher.signal(batch, "hidden" if path.fused else "logits", 1)
        return DivergenceSpec(kind="reverse_kl")(Targets(signal, theirs, batch.target_ids, scales=scales)).loss

    module = StudentLosses(student, path, None)
    return peak_above(lambda: module(batch, score).sum().backward())

fused = LossPath(True, BUDGET, "")
peak(1024, 64, fused)
print(peak(2**12, T, fused), peak(2**15, T, fused), peak(2**15, T, LOGITS))
"""


@pytest.mark.unit
def test_memory_follows_the_byte_budget_and_not_the_logits() -> None:
    """512 tokens: 8 times the vocabulary adds 56 MiB of logits on each side, and to the fused path little more than the head."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    small, large, through_logits = (int(word) / 2**20 for word in run.stdout.split()[-3:])
    head = 2**15 * 16 * 4 / 2**20
    assert large - small < 5 * head + 8, (small, large)
    assert large < 40, large
    assert through_logits > 2 * 512 * 2**15 * 4 / 2**20
