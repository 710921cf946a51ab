"""The training loop: rollout → score → loss → step → log.

One optimizer step takes ``train.batch_size`` samples by their global numbers. Each rank makes its share of the sequences, cuts
them into micro-batches, and adds the gradient of

    loss = Σ_tokens ℓ / N,     N = supervised tokens of the whole global batch

so that the result does not depend on the number of ranks, on accumulation, or on how sequences are laid out in rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from distill.assembly import Parts
from distill.checkpoint import Checkpoints
from distill.config import RunConfig
from distill.data.batch import TokenBatch, collate
from distill.data.order import shard
from distill.data.packing import check_packing
from distill.data.tokenize import TokenSequence
from distill.distributed import device, gathered, raise_together, rank, total, world_size
from distill.engine import TrainEngine
from distill.errors import DataError, NonFiniteLossError
from distill.evaluation import Evaluator
from distill.methods import Source, Targets
from distill.metrics import MetricsLog
from distill.progress import StepProgress
from distill.runs import RunFolder
from distill.samples import SampleSource, StepSamples
from distill.seeds import mix
from distill.teacher import ColocatedTeacher
from distill.totals import StepTotals

DROPOUT = 14  # purpose of the torch generator during a step


class Trainer:
    """One run on this rank. All ranks construct it and call ``run`` together."""

    def __init__(self, config: RunConfig, parts: Parts, folder: RunFolder) -> None:
        self.config, self.parts, self.folder = config, parts, folder
        self.engine = TrainEngine(parts.student, config.engine, config.train)
        self.teacher = ColocatedTeacher(parts.teacher) if parts.teacher is not None else None
        self.source = SampleSource(config, parts.task, parts.tokenizer, parts.method, parts.teacher)
        self.evaluator = Evaluator(config, parts.held_out, parts.tokenizer, in_training=True)
        self.checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
        self.done = 0  # optimizer steps taken
        self.stopped = False  # train.stop_at was reached
        self.last_eval: dict[str, float] = {}

    def resume(self) -> bool:
        """Continue from the newest checkpoint, if there is one."""
        newest = self.checkpoints.latest()
        if newest is None:
            return False
        state = self.checkpoints.load(self.engine, newest)
        self.done, self.stopped, self.last_eval = state["step"], state["stopped"], state["eval"]
        return True

    def run(self) -> dict[str, float]:
        """Train to the end (or until ``train.stop_at``); returns the last evaluation's figures."""
        options, log = self.config.train, None
        if rank() == 0:
            log = MetricsLog(self.folder, self.config.run, self.done, self.config.resolved)
        if options.pack:
            self._check_packing()
        with StepProgress("train", options.steps, self.done, options.log_every) as progress:
            if self.done == 0 and self.config.eval.every:
                before = self._evaluate(progress)
                if log is not None:
                    log.write(0, before)
            while self.done < options.steps and not self.stopped:
                figures = self.step()
                self.stopped = self._evaluate_if_due(figures, progress)
                if log is not None:
                    log.write(self.done, figures)
                progress.update(self.done, shown(figures))
                if self.stopped or self.done == options.steps or self.done % self.config.checkpoint.every == 0:
                    self._save()
                if self.stopped:
                    progress.note(f"pass@1 reached train.stop_at={options.stop_at} at step {self.done}")
        if log is not None:
            log.close()
        return self.last_eval

    def _save(self) -> None:
        """A checkpoint of everything that the rest of the run depends on; sample order and seeds follow from the step."""
        state = {"step": self.done, "stopped": self.stopped, "eval": self.last_eval}
        self.checkpoints.save(self.engine, self.done, state)

    def step(self) -> dict[str, float]:
        """One optimizer step over the next ``train.batch_size`` samples; returns its figures."""
        began = time.perf_counter()
        torch.manual_seed(mix(self.config.seed, DROPOUT, self.done, rank()) % (1 << 63))
        size = self.config.train.batch_size
        samples = range(self.done * size, (self.done + 1) * size)
        made, problem = self._make(self._share(samples))
        batches = self._micro_batches(made)
        tokens, problems = total([float(sum(len(batch.target_ids) for batch in batches)), float(problem is not None)])
        if problems:
            raise_together(DataError, problem)
        totals = StepTotals()
        for number, batch in enumerate(batches):
            self._accumulate(batch, tokens, totals)
            if number == len(batches) - 1:
                figures = self._agree(totals, made, samples)
            self.engine.step()
        self._check_gradient(samples)
        self.done += 1
        seconds = time.perf_counter() - began
        return figures | {
            "train/grad_norm": self.engine.grad_norm,
            "train/lr": self.engine.lr,
            "perf/step_s": seconds,
            "perf/tokens_per_s": tokens / seconds,
        }

    def _make(self, samples: range) -> tuple[StepSamples, str | None]:
        """This rank's sequences, or what is wrong with one: the next reduction tells the other ranks."""
        writes = Source.STUDENT in self.parts.method.uses()
        with self.engine.plain_student() if writes else nullcontext() as student:
            try:
                return self.source.make(samples, student), None
            except DataError as error:
                return StepSamples([]), str(error)

    def _share(self, samples: range) -> range:
        part = shard(samples, rank(), world_size())
        assert isinstance(part, range)
        return part

    def _micro_batches(self, made: StepSamples) -> list[TokenBatch]:
        """Exactly ``accumulation`` micro-batches, empty ones included: every rank must make the same number of passes."""
        size, pad = self.config.train.micro_batch_size, self.parts.tokenizer.pad_token_id
        assert isinstance(pad, int)
        chunks = [made.sequences[i * size : (i + 1) * size] for i in range(self.engine.accumulation)]
        return [collate(chunk, pad, self._row_length(chunk)).to(device()) for chunk in chunks]

    def _row_length(self, sequences: Sequence[TokenSequence]) -> int | None:
        """Packed rows are as long as the longest sequence: never more work than padding, in projections or in attention."""
        if not self.config.train.pack:
            return None
        return max((len(sequence.ids) for sequence in sequences), default=1)

    def _accumulate(self, batch: TokenBatch, tokens: float, totals: StepTotals) -> None:
        """Forward and backward of one micro-batch; adds to ``totals``."""
        student_logits = self.engine.forward(batch)
        teacher_logits = None
        if self.parts.method.needs_teacher and self.teacher is not None:
            teacher_logits = self.teacher.logits(batch)
        losses = self.parts.method.token_losses(Targets(student_logits, teacher_logits, batch.target_ids))
        totals.add(losses, batch)
        loss = losses.loss.sum()
        # No targets at all: still a backward pass, because ZeRO reduces gradients inside it on every rank.
        self.engine.backward(loss / max(tokens, 1.0) if len(batch.target_ids) else student_logits.sum() * 0.0)

    def _agree(self, totals: StepTotals, made: StepSamples, samples: range) -> dict[str, float]:
        """Global figures of the step. Raises NonFiniteLossError on every rank, before any weight moves."""
        counts = [made.skipped, made.rollouts, made.generated_tokens, made.finished, made.correct, totals.tokens]
        sums = total([*map(float, counts), *totals.values()])
        skipped, rollouts, generated, finished, correct, tokens, loss, bad, *stats = sums
        if bad:
            self._stop_for(totals)
        per_token = max(tokens, 1.0)
        figures = {
            "train/loss": loss / per_token,
            "train/tokens": tokens,
            "data/samples": float(samples.stop),
            "data/epoch": self.source.order.epoch(samples.stop),
            "data/skipped": skipped,
            "perf/sample_s": made.seconds,
        }
        figures |= {f"monitor/{name}": value / per_token for name, value in zip(totals.names, stats, strict=True)}
        if rollouts:
            figures |= {
                "rollout/share": rollouts / len(samples),
                "rollout/mean_length": generated / rollouts,
                "rollout/finished": finished / rollouts,
                "rollout/pass_rate": correct / rollouts,
                "rollout/tokens_per_s": generated / max(made.seconds, 1e-9),
            }
        return figures

    def _stop_for(self, totals: StepTotals) -> None:
        bad = [name for part in gathered(totals.bad_samples()) for name in part]
        names = f"{', '.join(bad[:4])}{' and others' if len(bad) > 4 else ''}"
        raise NonFiniteLossError(
            f"step {self.done + 1}: the loss is not finite on {names}; no weight was changed. {self._last_good()}. "
            "Try a lower engine.lr, engine.clip=1, or engine.dtype=float32, and look at these samples"
        )

    def _check_gradient(self, samples: range) -> None:
        """A gradient that overflowed has spoilt the weights in memory: stop before they are saved."""
        if not math.isfinite(self.engine.grad_norm):
            raise NonFiniteLossError(
                f"step {self.done + 1}: the gradient norm is {self.engine.grad_norm} although every loss is finite (samples "
                f"{samples.start} to {samples.stop - 1}). {self._last_good()}. Try a lower engine.lr or engine.dtype=float32"
            )

    def _last_good(self) -> str:
        good = self.checkpoints.latest()
        return f"The last good checkpoint is {good}" if good else "There is no checkpoint yet"

    def _evaluate_if_due(self, figures: dict[str, float], progress: StepProgress) -> bool:
        """Adds ``eval/…`` to ``figures`` when due; True once ``train.stop_at`` is reached."""
        every, stop_at = self.config.eval.every, self.config.train.stop_at
        if not every or (self.done % every and self.done != self.config.train.steps):
            return False
        figures |= self._evaluate(progress)
        return stop_at is not None and figures["eval/pass_at_1"] >= stop_at

    def _evaluate(self, progress: StepProgress) -> dict[str, float]:
        """Measure on the end of the held-out split; ``distill eval`` starts from its front."""
        with self.engine.plain_student() as student:
            self.last_eval = self.evaluator.measure(student, self.parts.teacher)
        progress.note(
            f"step {self.done}: " + "  ".join(f"{name} {value:.4g}" for name, value in self.last_eval.items())
        )
        return {f"eval/{name}": value for name, value in self.last_eval.items()}

    def _check_packing(self) -> None:
        """A model that lets packed sequences see each other would train on the wrong context: refuse it at once."""
        rows = 1 if self.config.train.micro_batch_size == 1 else 2

        with self.engine.plain_student() as student:
            vocabulary = student.get_output_embeddings().weight.shape[0]
            check_packing(
                lambda ids, positions: student(input_ids=ids, position_ids=positions, use_cache=False).logits,
                vocabulary,
                device(),
                rows,
            )


def shown(figures: dict[str, Any]) -> dict[str, float]:
    """What the progress line shows of a step's figures."""
    names = {
        "loss": "train/loss",
        "tok/s": "perf/tokens_per_s",
        "len": "rollout/mean_length",
        "pass": "rollout/pass_rate",
    }
    return {short: figures[key] for short, key in names.items() if key in figures}
