"""``python -m distill.bench.gradient_variance``: how noisy the gradient of a step is under each way to add up token losses.

    python -m distill.bench.gradient_variance model=hf model.student.path=FOLDER method=grpo train.batch_size=64 \\
        --batches 30 --json outputs/bench/gradient_variance.json

The weights stay as they are. Each of R batches is made as in training (prompts, rollouts, verdicts, the method's weights), the
gradient g_i of every sequence's summed token loss is taken once, and each aggregation of ``distill.aggregation`` combines the same
g_i into its estimate ĝ = Σ_i c_i g_i. So the estimates differ in their weights c_i only. Over the batches, with ḡ their mean:

    noise    Σ_r ‖ĝ_r − ḡ‖² / (R − 1)            trace of the covariance
    signal   ‖ḡ‖² − noise/R                      squared norm of the expected gradient, unbiased
    ratio    noise / signal                      does not depend on the scale of the c_i, which a learning rate absorbs
    cosine   of ḡ with that of ``constant``      the direction that is unbiased in length has 1, up to noise

Claim under test (ΔL, arXiv 2509.07558): with α = 1 ``delta_l`` has the least noise among the estimates without bias, if the noise
of g_i grows with the length of sequence i. One process; every key of ``distill train`` can be set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from distill.aggregation import aggregation_scales, tokens_per_sequence
from distill.assembly import Parts, assemble
from distill.config import AggregationSpec, RunConfig, load_config
from distill.distributed import device
from distill.errors import ConfigError, DistillError
from distill.methods.base import BatchFacts
from distill.micro_batches import Layout, MicroBatch, micro_batches
from distill.models import TargetLogits, causal_lm
from distill.preparing import DRAWS
from distill.progress import StepProgress, console
from distill.runs import write_json
from distill.samples import SampleSource
from distill.seeds import mix
from distill.teachers.open import open_teachers
from distill.teachers.signals import FullLogits

AGGREGATIONS = {
    "token_mean": AggregationSpec(kind="token_mean"),
    "sequence_mean": AggregationSpec(kind="sequence_mean"),
    "constant": AggregationSpec(kind="constant"),
    "delta_l 0.75": AggregationSpec(kind="delta_l", alpha=0.75),
    "delta_l 1": AggregationSpec(kind="delta_l", alpha=1.0),
}
REFERENCE = "constant"


class GradientSampler:
    """Per-sequence gradients of whole batches at the student's present weights."""

    def __init__(self, config: RunConfig, parts: Parts) -> None:
        self.config, self.method = config, parts.method
        self.teachers = open_teachers(config, parts)
        self.student = parts.student
        self.source = SampleSource(config, parts.task, parts.tokenizer, parts.method, self.teachers.writer)
        self.logits = TargetLogits(parts.student)
        self.parameters = [p for p in parts.student.parameters() if p.requires_grad]
        self.pad = parts.tokenizer.pad_token_id

    def batch(self, number: int) -> tuple[Tensor, list[int]]:
        """Batch ``number``: gradients ``[sequences, parameters]`` of the summed losses, and supervised tokens of each."""
        size = self.config.train.batch_size
        made = self.source.make(range(number * size, (number + 1) * size), causal_lm(self.student).eval())
        facts = BatchFacts(made.facts)
        layout = Layout(1, len(made.sequences), False, self.pad, device())
        seeds = [mix(self.config.seed, DRAWS, s.sample) for s in made.sequences] if self.method.draws else None
        singles = micro_batches(layout, made.sequences, [1.0] * len(made.sequences), self.method.weigh(facts), seeds)
        return torch.stack([self.gradient(single) for single in singles]), [fact.tokens for fact in made.facts]

    def gradient(self, single: MicroBatch) -> Tensor:
        """∇ Σ_t ℓ_t of one sequence, with the method's weight, flat."""
        logits = self.logits(single.student)
        self.teachers.submit([single])
        teacher, reference = self.teachers.take(single)
        losses = self.method.token_losses(single.targets(FullLogits(logits), teacher, reference))
        loss = (losses.loss * single.scales).sum() + 0.0 * logits.sum()
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return torch.cat(
            [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(self.parameters, gradients)]
        )


def combine(gradients: Tensor, lengths: Sequence[int], spec: AggregationSpec, constant: float) -> Tensor:
    """Σ_i c_i g_i, fp64 ``[parameters]``."""
    scales = aggregation_scales(spec, lengths, constant)
    weights = torch.tensor(scales.relative, dtype=torch.float64, device=gradients.device) / scales.denominator
    return weights @ gradients.double()


def noise_and_signal(estimates: Tensor) -> tuple[float, float]:
    """(trace of the covariance, unbiased squared norm of the mean) of estimates ``[R, parameters]``, R ≥ 2."""
    mean = estimates.mean(0)
    noise = float((estimates - mean).square().sum()) / (len(estimates) - 1)
    return noise, float(mean.square().sum()) - noise / len(estimates)


def measure(config: RunConfig, batches: int) -> dict[str, Any]:
    """Figures of every aggregation over ``batches`` batches. Raises ConfigError for fewer than 2."""
    if batches < 2:
        raise ConfigError(f"--batches {batches}: a variance needs at least 2")
    sampler = GradientSampler(config, assemble(config))
    constant = tokens_per_sequence(config)
    estimates: dict[str, list[Tensor]] = {name: [] for name in AGGREGATIONS}
    lengths: list[int] = []
    with StepProgress("batches", batches, 0, max(1, batches // 4)) as progress:
        for number in range(batches):
            gradients, tokens = sampler.batch(number)
            lengths += tokens
            for name, spec in AGGREGATIONS.items():
                estimates[name].append(combine(gradients, tokens, spec, constant))
            progress.update(number + 1, {})
    stacked = {name: torch.stack(values) for name, values in estimates.items()}
    reference = stacked[REFERENCE].mean(0)
    figures: dict[str, Any] = {}
    for name, values in stacked.items():
        noise, signal = noise_and_signal(values)
        cosine = float(torch.nn.functional.cosine_similarity(values.mean(0), reference, dim=0))
        figures[name] = {
            "noise": noise,
            "signal": signal,
            "ratio": noise / signal if signal > 0 else None,
            "cosine": cosine,
        }
    spread = torch.tensor(lengths, dtype=torch.float64)
    return {
        "method": config.method["name"],
        "batches": batches,
        "batch_size": config.train.batch_size,
        "length_mean": float(spread.mean()),
        "length_std": float(spread.std()),
        "aggregations": figures,
    }


def table(result: dict[str, Any]) -> Table:
    shown = Table("aggregation", "noise / signal", "against token mean", "noise", "signal", "cosine to constant")
    base = result["aggregations"]["token_mean"]["ratio"]
    for name, row in result["aggregations"].items():
        ratio = row["ratio"]
        shown.add_row(
            name,
            "signal lost in noise" if ratio is None else f"{ratio:.3f}",
            "" if ratio is None or base is None else f"{ratio / base:.2f}",
            f"{row['noise']:.3e}",
            f"{row['signal']:.3e}",
            f"{row['cosine']:.3f}",
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides, as of distill train")
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args(arguments)
    try:
        result = measure(load_config("config", options.overrides), options.batches)
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(table(result))
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(options.json), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
