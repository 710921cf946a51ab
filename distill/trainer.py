"""The training loop: rollout → score → loss → step → log.

One optimizer step takes ``train.batch_size`` samples by their global numbers. Each rank makes its share of the sequences; all
ranks learn a few facts of every sequence (lengths, verdicts); from these follow the method's weights w and the scale c of
each sequence, and each rank adds up, micro-batch by micro-batch, the gradient of

    loss = Σ_i c_i w_i Σ_t ℓ_it        (see ``distill.aggregation``)

so that the result does not depend on the number of ranks, on accumulation, or on how sequences are laid out in rows.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch

from distill.aggregation import aggregation_scales, tokens_per_sequence
from distill.assembly import Parts
from distill.checkpoint import Checkpoints
from distill.config import RunConfig
from distill.data.order import shard
from distill.data.packing import check_packing
from distill.distributed import all_or_nothing, device, gathered, raise_first, rank, total, world_size
from distill.engine import TrainEngine
from distill.errors import CheckpointError, DataError, NonFiniteLossError
from distill.evaluation import Evaluator
from distill.methods.base import BatchFacts, SequenceFacts, Targets
from distill.metrics import MetricsLog
from distill.micro_batches import Layout, MicroBatch, micro_batches
from distill.monitors import Monitors, text_figures
from distill.progress import StepProgress
from distill.runs import RunFolder
from distill.samples import SampleSource, StepSamples
from distill.seeds import mix
from distill.teacher import FrozenModels
from distill.totals import StepTotals

DROPOUT, DRAWS = 14, 16  # purposes of the random numbers during a step


class Trainer:
    """One run on this rank. All ranks construct it and call ``run`` together."""

    def __init__(self, config: RunConfig, parts: Parts, folder: RunFolder) -> None:
        self.config, self.parts, self.folder = config, parts, folder
        self.method = parts.method
        self.frozen = FrozenModels(parts)
        self.engine = TrainEngine(parts.student, config.engine, config.train)
        self.source = SampleSource(config, parts.task, parts.tokenizer, self.method, self.frozen.writer)
        self.evaluator = Evaluator(config, parts.held_out, parts.tokenizer, in_training=True)
        self.checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
        self.monitors = Monitors(config.monitor)
        pad = parts.tokenizer.pad_token_id
        assert isinstance(pad, int)
        train = config.train
        self.layout = Layout(train.micro_batch_size, self.engine.accumulation, train.pack, pad, device())
        self.done = 0  # optimizer steps taken
        self.stopped = False  # train.stop_at was reached
        self.last_eval: dict[str, float] = {}

    def resume(self) -> bool:
        """Continue from the newest checkpoint, if there is one."""
        newest = self.checkpoints.latest()
        if newest is None:
            return False
        state, frozen = self.checkpoints.load(self.engine, newest)
        with all_or_nothing(CheckpointError):
            self.frozen.restore(frozen)
        self.done, self.stopped, self.last_eval = state["step"], state["stopped"], state["eval"]
        self.monitors.restore(state["monitors"])
        return True

    def run(self) -> dict[str, float]:
        """Train to the end (or until ``train.stop_at``); returns the last evaluation's figures."""
        options, log = self.config.train, None
        if rank() == 0:
            kept = self.done or -1  # without a checkpoint step 0 is measured again
            log = MetricsLog(self.folder, self.config.run, kept, self.config.resolved)
        if options.pack:
            self._check_packing()
        with StepProgress("train", options.steps, self.done, options.log_every) as progress:
            if self.done == 0 and self.config.eval.every:
                before = self._evaluate(progress)
                if log is not None:
                    log.write(0, before)
            while self.done < options.steps and not self.stopped:
                figures, alarms = self.step()
                for line in alarms:
                    progress.note(f"step {self.done}: {line}")
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
        state = {
            "step": self.done,
            "stopped": self.stopped,
            "eval": self.last_eval,
            "monitors": self.monitors.state(),
        }
        self.checkpoints.save(self.engine, self.done, state, self.frozen.state())

    def step(self) -> tuple[dict[str, float], list[str]]:
        """One optimizer step over the next ``train.batch_size`` samples; returns its figures and what is alarming in them."""
        began = time.perf_counter()
        torch.manual_seed(mix(self.config.seed, DROPOUT, self.done, rank()) % (1 << 63))
        size = self.config.train.batch_size
        samples = range(self.done * size, (self.done + 1) * size)
        self.frozen.renew(self.engine, self.done)
        made, facts = self._make(samples)
        batches, denominator = self._batches(made, facts)
        totals = StepTotals()
        for number, batch in enumerate(batches):
            self._accumulate(batch, denominator, facts.progress, totals)
            if number == len(batches) - 1:
                figures = self._agree(totals, denominator, made, samples)
            self.engine.step()
        self._check_gradient(samples)
        self.done += 1
        seconds = time.perf_counter() - began
        figures |= text_figures(facts)
        figures |= {
            "train/grad_norm": self.engine.grad_norm,
            "train/lr": self.engine.lr,
            "perf/step_s": seconds,
            "perf/tokens_per_s": figures["train/tokens"] / seconds,
        }
        return figures, self.monitors.after_step(figures, facts)

    def _make(self, samples: range) -> tuple[StepSamples, BatchFacts]:
        """This rank's sequences, and what every rank knows of all of them. Raises DataError on every rank if one failed."""
        progress, problem, made = self.done / self.config.train.steps, None, StepSamples()
        share = shard(samples, rank(), world_size())
        assert isinstance(share, range)
        with self.engine.plain_student() if self.source.needs_student else nullcontext() as student:
            try:
                made = self.source.make(share, student, progress)
            except DataError as error:
                problem = str(error)
        answers: list[tuple[list[SequenceFacts], str | None]] = gathered((made.facts, problem))
        raise_first(DataError, [text for _, text in answers])
        return made, BatchFacts([fact for facts, _ in answers for fact in facts], progress)

    def _batches(self, made: StepSamples, facts: BatchFacts) -> tuple[list[MicroBatch], float]:
        """This rank's micro-batches, and what the sum of their scaled losses is to be divided by."""
        lengths = [sequence.tokens for sequence in facts.sequences]
        scales = aggregation_scales(self.config.train.aggregation, lengths, tokens_per_sequence(self.config))
        weights = self.method.weigh(facts)
        place = {sequence.sample: position for position, sequence in enumerate(facts.sequences)}
        mine = [place[sequence.sample] for sequence in made.sequences]
        seeds = [mix(self.config.seed, DRAWS, sequence.sample) for sequence in made.sequences]
        batches = micro_batches(
            self.layout,
            made.sequences,
            [scales.relative[position] for position in mine],
            [weights[position] for position in mine],
            seeds if self.method.draws else None,
        )
        return batches, scales.denominator

    def _accumulate(self, batch: MicroBatch, denominator: float, progress: float, totals: StepTotals) -> None:
        """Forward and backward of one micro-batch; adds to ``totals``."""
        student_logits = self.engine.forward(batch.student)
        targets = Targets(
            student_logits,
            self.frozen.teacher_logits(batch.teacher),
            batch.student.target_ids,
            reference_logits=self.frozen.reference_logits(batch.student),
            sequence_index=batch.student.sequence_index,
            advantages=batch.advantages,
            behaviour_logprobs=batch.student.behaviour_logprobs,
            draws=batch.draws,
            progress=progress,
        )
        losses = self.method.token_losses(targets)
        totals.add(losses, batch.scales, batch.student)
        loss = (losses.loss * batch.scales).sum()
        # No targets at all: still a backward pass, because ZeRO reduces gradients inside it on every rank.
        self.engine.backward(loss / denominator if batch.tokens else student_logits.sum() * 0.0)

    def _agree(self, totals: StepTotals, denominator: float, made: StepSamples, samples: range) -> dict[str, float]:
        """Global figures of the step. Raises NonFiniteLossError on every rank, before any weight moves."""
        counts = [made.skipped, made.rollouts, made.generated_tokens, made.finished, made.correct, totals.tokens]
        decoded = [made.student_tokens, made.teacher_tokens]
        sums = total([*map(float, counts), *decoded, *totals.values()])
        skipped, rollouts, generated, finished, correct, tokens, by_student, by_teacher, loss, bad, *stats = sums
        if bad:
            self._stop_for(totals)
        per_token = max(tokens, 1.0)
        figures = {
            "train/loss": loss / denominator,
            "train/tokens": tokens,
            "data/samples": float(samples.stop),
            "data/epoch": self.source.epoch(samples.stop),
            "data/skipped": skipped,
            "perf/sample_s": made.seconds,
        }
        figures |= {f"monitor/{name}": value / per_token for name, value in zip(totals.names, stats, strict=True)}
        if by_student or by_teacher:
            figures |= {"rollout/student_tokens": by_student, "rollout/teacher_tokens": by_teacher}
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
        figures = {f"eval/{name}": value for name, value in self.last_eval.items()}
        for line in self.monitors.after_evaluation(figures):
            progress.note(f"step {self.done}: {line}")
        return figures

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
