"""The training loop: rollout → score → loss → step → log.

A step's gradient is ``step_gradient``'s, its figures are ``step_figures``', held-out measurements ``measuring``'s; here is their
order, what a checkpoint holds of them, and what happens where a step cannot be taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

import ncclx_py
from distill import step_figures
from distill.assembly import Parts
from distill.checkpoint import Checkpoints
from distill.config import RunConfig
from distill.data.packing import check_packing
from distill.distributed import all_or_nothing, device, gathered, rank
from distill.engine import TrainEngine
from distill.errors import CheckpointError, NonFiniteLossError, TeacherRankLost
from distill.loss_path import choose_loss_path
from distill.measuring import HeldOut
from distill.metrics import MetricsLog
from distill.micro_batches import Layout
from distill.monitors import Monitors, text_figures
from distill.preparing import PreparedStep, StepMaker
from distill.progress import StepProgress
from distill.replicas.books import SharedLog
from distill.replicas.many import make_replicas
from distill.rollouts.engines import open_engine
from distill.runs import RunFolder
from distill.samples import SampleSource
from distill.sorted_samples import SortedSamples, schedule_figures
from distill.step_gradient import StepGradient
from distill.stopping import ToldToStop, told
from distill.teachers.open import open_teachers
from distill.token_counts import TokenCounts
from distill.totals import StepTotals
from ncclx_py.elastic import Dropped, EpochChanged, RunFinished


class Trainer:
    """One run on this rank. All ranks construct it and call ``run`` together."""

    def __init__(self, config: RunConfig, parts: Parts, folder: RunFolder) -> None:
        self.config, self.parts, self.folder = config, parts, folder
        self.method = parts.method
        self.teachers = open_teachers(config, parts)
        self.path = choose_loss_path(config, parts.method, parts.student)
        self.engine = TrainEngine(parts.student, config.engine, config.train, self.path)
        self.checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
        self.monitors = Monitors(config.monitor)
        self.held_out = HeldOut(config, parts, self.engine, self.monitors)
        self.done = 0  # optimizer steps taken
        self.stopped = False  # train.stop_at or train.token_budget was reached
        self.tokens = TokenCounts()
        # Last, as it may start servers, which `close` ends.
        teacher = self.teachers.writer
        self.rollouts = open_engine(config, parts.tokenizer, self.method, parts.student, teacher, folder.path)
        self.replicas = make_replicas(config, folder)
        samples = SortedSamples if config.rollout.schedule == "sorted" else SampleSource
        self.source = samples(config, parts.task, parts.tokenizer, self.method, teacher, self.rollouts)
        pad = parts.tokenizer.pad_token_id
        assert isinstance(pad, int)
        layout = Layout(config.train.micro_batch_size, self.engine.accumulation, config.train.pack, pad, device())
        maker = StepMaker(config, self.method, self.engine, self.source, self.rollouts, self.replicas, layout)
        self.gradient = StepGradient(maker, self.engine, self.teachers)

    def close(self) -> None:
        """End what the run has started beside itself."""
        self.teachers.close()
        self.replicas.close()
        self.rollouts.close()

    # The loop

    def run(self) -> dict[str, float]:
        """Train to the end (or until ``train.stop_at``, ``train.token_budget``); returns the last evaluation's figures.

        Raises ToldToStop, with everything saved, where a signal asked for it (``distill.stopping``).
        """
        log = self.replicas.log(self) if rank() == 0 else None
        if self.config.train.pack:
            self._check_packing()
        progress = StepProgress("train", self.config.train.steps, self.done, self.config.train.log_every)
        leave = False
        with progress, suppress(RunFinished):  # by other replicas, while this one was away
            if self.done == 0 and self.config.eval.every:
                before = self.held_out.measure(0, progress)
                write(log, 0, before | self.tokens.figures())
            while not (self.ended or leave):
                figures, alarms = self.step()
                for line in alarms:
                    progress.note(f"step {self.done}: {line}")
                measured, self.stopped = self.held_out.after_step(self.done, self.tokens.spent, progress)
                figures |= measured
                write(log, self.done, figures)
                progress.update(self.done, shown(figures))
                leave = told() and not self.ended
                if self.ended or leave or self.done % self.config.checkpoint.every == 0:
                    self.replicas.save(self._save)
        if log is not None:
            log.close()
        if leave:
            raise ToldToStop(f"told to stop after step {self.done}: saved; the same command continues")
        return self.held_out.last

    @property
    def ended(self) -> bool:
        """Whether there is no step left to take."""
        return self.stopped or self.done >= self.config.train.steps

    def step(self) -> tuple[dict[str, float], list[str]]:
        """One optimizer step over the next ``train.batch_size`` samples; returns its figures and what is alarming in them."""
        began = time.perf_counter()
        while True:
            self.replicas.begin(self)
            before = self.tokens.state()
            try:
                figures, taken = self._attempt()
                break
            except (EpochChanged, Dropped):  # a replica came or went: the same samples again, by those who are there
                self._forget_attempt(before)
            except TeacherRankLost:
                self._forget_attempt(before)
                if not self.teachers.recover():
                    self.replicas.save(self._save)  # the weights are those of the last step that was taken
                    raise
        self.engine.step()
        self._check_gradient(taken.samples)
        self.done += 1
        seconds = time.perf_counter() - began
        figures |= self.replicas.figures()
        figures |= {
            "train/grad_norm": self.engine.grad_norm,
            "train/lr": self.engine.lr,
            "perf/step_s": seconds,
            "perf/tokens_per_s": figures["train/tokens"] / seconds,
        }
        return figures, self.monitors.after_step(figures, taken.facts)

    def _attempt(self) -> tuple[dict[str, float], PreparedStep]:
        """Everything of a step but the step: when this returns, all replicas hold the same gradient and will apply it.

        Raises NonFiniteLossError on every rank, before any weight moves.
        """
        ncclx_py.mark_step(self.done + 1)
        step, totals = self.gradient.add_up(self.done, self.replicas.place)
        sums = step_figures.agree(step.made, totals, self.teachers, self.replicas)
        if sums.bad:
            self._stop_for(totals)
        self.tokens.add(**sums.spent())
        epoch = self.source.epoch(step.samples.stop)
        figures = step_figures.figures(sums, step, totals, epoch, self.tokens.figures())
        self.replicas.commit(self)
        figures |= text_figures(step.facts) | schedule_figures(self.config, step.facts, step.slot_times)
        return figures, step

    def _forget_attempt(self, tokens: dict[str, float]) -> None:
        """Back to before the step, with ``tokens`` as they were counted."""
        self.gradient.forget()
        self.tokens = TokenCounts(**tokens)

    def follow(self, gradients: list[Tensor], state: dict[str, Any]) -> None:
        """Take a step that other replicas have computed: ``gradients`` as `TrainEngine.gradients` has them, ``state`` after it."""
        self.gradient.install(gradients, self.done)
        self.engine.step()
        self.restore(state)

    # What a checkpoint holds

    def resume(self) -> bool:
        """Continue from the newest checkpoint, or with the other replicas from where they are; False: from the start."""
        return self.replicas.enter(self)

    def load_newest(self) -> bool:
        """Continue from the newest checkpoint, if there is one."""
        newest = self.checkpoints.latest()
        if newest is not None:
            self.load(self.checkpoints, newest)
        return newest is not None

    def load(self, checkpoints: Checkpoints, checkpoint: Path) -> None:
        """Put everything back to where it was when the checkpoint was written."""
        state, frozen = checkpoints.load(self.engine, checkpoint)
        with all_or_nothing(CheckpointError):
            self.teachers.restore(frozen)
        self.restore(state)

    def state(self) -> dict[str, Any]:
        """What the rest of the run depends on besides weights and optimizer; sample order and seeds follow from the step."""
        return {
            "step": self.done,
            "stopped": self.stopped,
            "eval": self.held_out.last,
            "monitors": self.monitors.state(),
            "samples": gathered(self.source.state()),
            "tokens": self.tokens.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        self.done, self.stopped, self.held_out.last = state["step"], state["stopped"], state["eval"]
        self.monitors.restore(state["monitors"])
        self.source.restore(state["samples"][rank()])
        self.tokens = TokenCounts(**state["tokens"])

    def _save(self) -> None:
        self.checkpoints.save(self.engine, self.done, self.state(), self.teachers.state())

    # What stops a run

    def _stop_for(self, totals: StepTotals) -> None:
        bad = [name for part in gathered(totals.bad_samples()) for name in part]
        names = f"{', '.join(bad[:4])}{' and others' if len(bad) > 4 else ''}" if bad else "samples of another replica"
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


def write(log: MetricsLog | SharedLog | None, step: int, figures: dict[str, float]) -> None:
    """Only rank 0 has a log."""
    if log is not None:
        log.write(step, figures)


def shown(figures: Mapping[str, Any]) -> dict[str, float]:
    """What the progress line shows of a step's figures."""
    names = {
        "loss": "train/loss",
        "tok/s": "perf/tokens_per_s",
        "len": "rollout/mean_length",
        "pass": "rollout/pass_rate",
    }
    return {short: figures[key] for short, key in names.items() if key in figures}
