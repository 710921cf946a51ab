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
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ncclx_py
from distill.assembly import Parts
from distill.checkpoint import Checkpoints
from distill.config import RunConfig
from distill.data.packing import check_packing
from distill.distributed import all_or_nothing, device, gathered, raise_first, rank
from distill.engine import TrainEngine
from distill.errors import CheckpointError, NonFiniteLossError, TeacherRankLost
from distill.evaluation import Evaluator
from distill.loss_path import choose_loss_path
from distill.methods.base import BatchFacts, StudentSignal, Targets, TokenLosses
from distill.micro_batches import Layout, MicroBatch, micro_batches
from distill.monitors import Monitors, text_figures
from distill.preparing import PreparedStep, StepMaker
from distill.progress import StepProgress
from distill.replicas.many import make_replicas
from distill.rollouts.engines import open_engine
from distill.runs import RunFolder
from distill.samples import SampleSource
from distill.seeds import mix
from distill.sorted_samples import SortedSamples, schedule_figures
from distill.stopping import ToldToStop, told
from distill.teachers.open import open_teachers
from distill.teachers.routing import losses_by_teacher
from distill.token_counts import TokenCounts
from distill.totals import StepTotals
from ncclx_py.elastic import Dropped, EpochChanged, RunFinished

DROPOUT = 14  # purpose of the random numbers during a step


class Trainer:
    """One run on this rank. All ranks construct it and call ``run`` together."""

    def __init__(self, config: RunConfig, parts: Parts, folder: RunFolder) -> None:
        self.config, self.parts, self.folder = config, parts, folder
        self.method = parts.method
        self.teachers = open_teachers(config, parts)
        self.path = choose_loss_path(config, parts.method, parts.student)
        self.engine = TrainEngine(parts.student, config.engine, config.train, self.path)
        self.evaluator = Evaluator(config, parts.held_out, parts.tokenizer, in_training=True)
        self.checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
        self.monitors = Monitors(config.monitor)
        pad = parts.tokenizer.pad_token_id
        assert isinstance(pad, int)
        train = config.train
        self.layout = Layout(train.micro_batch_size, self.engine.accumulation, train.pack, pad, device())
        self._next: PreparedStep | None = None  # its teacher has been asked already
        self._lost: str | None = None  # what this rank knows of a teacher's rank that is gone
        self.done = 0  # optimizer steps taken
        self.stopped = False  # train.stop_at or train.token_budget was reached
        self.tokens = TokenCounts()
        self.last_eval: dict[str, float] = {}
        # Last, as it may start servers, which `close` ends.
        teacher = self.teachers.writer
        self.rollouts = open_engine(config, parts.tokenizer, self.method, parts.student, teacher, folder.path)
        self.replicas = make_replicas(config, folder)
        samples = SortedSamples if config.rollout.schedule == "sorted" else SampleSource
        self.source = samples(config, parts.task, parts.tokenizer, self.method, teacher, self.rollouts)
        self.maker = StepMaker(config, self.method, self.engine, self.source, self.rollouts, self.replicas, self.layout)

    def close(self) -> None:
        """End what the run has started beside itself."""
        self.teachers.close()
        self.replicas.close()
        self.rollouts.close()

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

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        self.done, self.stopped, self.last_eval = state["step"], state["stopped"], state["eval"]
        self.monitors.restore(state["monitors"])
        self.source.restore(state["samples"][rank()])
        self.tokens = TokenCounts(**state["tokens"])

    def run(self) -> dict[str, float]:
        """Train to the end (or until ``train.stop_at``, ``train.token_budget``); returns the last evaluation's figures."""
        options, log, leave = self.config.train, None, False
        if rank() == 0:
            log = self.replicas.log(self)
        if options.pack:
            self._check_packing()
        progress = StepProgress("train", options.steps, self.done, options.log_every)
        with progress, suppress(RunFinished):  # by other replicas, while this one was away
            if self.done == 0 and self.config.eval.every:
                before = self._evaluate(progress)
                if log is not None:
                    log.write(0, before | self.tokens.figures())
            while self.done < options.steps and not self.stopped:
                figures, alarms = self.step()
                for line in alarms:
                    progress.note(f"step {self.done}: {line}")
                self.stopped = self._after_step(figures, progress)
                if log is not None:
                    log.write(self.done, figures)
                progress.update(self.done, shown(figures))
                ended = self.stopped or self.done == options.steps
                leave = told() and not ended
                if ended or leave or self.done % self.config.checkpoint.every == 0:
                    self.replicas.save(self._save)
                if leave:
                    break
        if log is not None:
            log.close()
        if leave:
            raise ToldToStop(f"told to stop after step {self.done}: saved; the same command continues")
        return self.last_eval

    def _save(self) -> None:
        self.checkpoints.save(self.engine, self.done, self.state(), self.teachers.state())

    def state(self) -> dict[str, Any]:
        """What the rest of the run depends on besides weights and optimizer; sample order and seeds follow from the step."""
        return {
            "step": self.done,
            "stopped": self.stopped,
            "eval": self.last_eval,
            "monitors": self.monitors.state(),
            "samples": gathered(self.source.state()),
            "tokens": self.tokens.state(),
        }

    def step(self) -> tuple[dict[str, float], list[str]]:
        """One optimizer step over the next ``train.batch_size`` samples; returns its figures and what is alarming in them."""
        began = time.perf_counter()
        while True:
            self.replicas.begin(self)
            before = self.tokens.state()
            try:
                figures, facts, samples = self._attempt()
                break
            except (EpochChanged, Dropped):  # a replica came or went: the same samples again, by those who are there
                self._forget_attempt(before)
            except TeacherRankLost:
                self._forget_attempt(before)
                if not self.teachers.recover():
                    self.replicas.save(self._save)  # the weights are those of the last step that was taken
                    raise
        self.engine.step()
        self._check_gradient(samples)
        self.done += 1
        seconds = time.perf_counter() - began
        figures |= self.replicas.figures()
        figures |= {
            "train/grad_norm": self.engine.grad_norm,
            "train/lr": self.engine.lr,
            "perf/step_s": seconds,
            "perf/tokens_per_s": figures["train/tokens"] / seconds,
        }
        return figures, self.monitors.after_step(figures, facts)

    def _forget_attempt(self, tokens: dict[str, float]) -> None:
        """Back to before the step: no gradient, nothing asked of the teacher, ``tokens`` as they were counted."""
        self.engine.discard()
        self.teachers.cancel()
        self._next = self._lost = None
        self.tokens = TokenCounts(**tokens)

    def _attempt(self) -> tuple[dict[str, float], BatchFacts, range]:
        """Everything of a step but the step: when this returns, all replicas hold the same gradient and will apply it."""
        ncclx_py.mark_step(self.done + 1)
        torch.manual_seed(mix(self.config.seed, DROPOUT, self.done, self.replicas.place) % (1 << 63))
        self.teachers.copies.renew(self.engine, self.done)
        step = self._prepared()
        totals = StepTotals([] if self.source.route is None else list(self.source.route.weights))
        for number, batch in enumerate(step.batches, 1):
            self.engine.announce(last=number == len(step.batches))
            self._accumulate(batch, step, totals)
            if number < len(step.batches):
                self.engine.step()
        if self.teachers.may_be_lost:
            raise_first(TeacherRankLost, gathered(self._lost))
        figures = self._agree(totals, step)
        self.replicas.commit(self)
        figures |= text_figures(step.facts) | schedule_figures(self.config, step.facts, step.slot_times)
        return figures, step.facts, step.samples

    def _prepared(self) -> PreparedStep:
        """The step to be taken now, its teacher asked; where that pays, the teacher is asked about the next one too."""
        step, self._next = self._next, None
        if step is None:
            step = self.maker.make(self.done)
            self.teachers.submit(step.batches)
        if self.teachers.ahead and self.maker.fixed and self.done + 1 < self.config.train.steps:
            self._next = self.maker.make(self.done + 1)
            self.teachers.submit(self._next.batches)
        return step

    def follow(self, gradients: list[Tensor], state: dict[str, Any]) -> None:
        """Take a step that other replicas have computed: ``gradients`` as `TrainEngine.gradients` has them, ``state`` after it."""
        self.teachers.copies.renew(self.engine, self.done)
        self.engine.announce(last=True)
        nothing = micro_batches(replace(self.layout, count=1), [], [], [], None)[0]
        losses = self.engine.token_losses(nothing.student, lambda student: TokenLosses(student.logits().sum(-1)))
        self.engine.backward(losses.loss.sum() * 0.0)
        for ours, theirs in zip(self.engine.gradients(), gradients, strict=True):
            ours.copy_(theirs)
        self.engine.step()
        self.restore(state)

    def _accumulate(self, batch: MicroBatch, step: PreparedStep, totals: StepTotals) -> None:
        """Forward and backward of one micro-batch; adds to ``totals``."""

        def score(student: StudentSignal) -> TokenLosses:
            try:
                teacher, reference = self.teachers.take(batch)
            except TeacherRankLost as error:  # other students may not know yet: go on as they do, to where all agree
                self._lost = str(error)
                return TokenLosses(student.logits().sum(-1) * 0.0)
            targets = Targets(
                student,
                teacher,
                batch.student.target_ids,
                reference=reference,
                sequence_index=batch.student.sequence_index,
                advantages=batch.advantages,
                behaviour_logprobs=batch.student.behaviour_logprobs,
                draws=batch.draws,
                progress=step.facts.progress,
                scales=batch.scales,
            )
            return losses_by_teacher(self.method, targets)

        losses = self.engine.token_losses(batch.student, score)
        if self._lost is not None:
            self.engine.backward(losses.loss.sum() * 0.0)
            return
        totals.add(losses, batch.scales, batch.student)
        loss = (losses.loss * batch.scales).sum()
        # No targets at all: still a backward pass, because ZeRO reduces gradients inside it on every rank.
        self.engine.backward(loss / step.denominator if batch.tokens else losses.loss.sum() * 0.0)

    def _agree(self, totals: StepTotals, step: PreparedStep) -> dict[str, float]:
        """Global figures of the step. Raises NonFiniteLossError on every rank, before any weight moves."""
        made, samples = step.made, step.samples
        counts = [made.skipped, made.rollouts, made.generated_tokens, made.finished, made.correct, totals.tokens]
        spent = [made.student_tokens, made.teacher_tokens, made.teacher_read]
        said = self.teachers.figures()
        asked = len(said)
        sums = self.replicas.total([*map(float, counts), *spent, *said.values(), *totals.values()])
        first = len(counts) + len(spent)
        said = self.teachers.ratios(dict(zip(said, sums[first : first + asked], strict=True)))
        del sums[first : first + asked]
        skipped, rollouts, generated, finished, correct, tokens, by_student, by_teacher, read, loss, bad, *stats = sums
        if bad:
            self._stop_for(totals)
        self.tokens.add(student_generated=by_student, teacher_generated=by_teacher, teacher_read=read, trained=tokens)
        per_token = max(tokens, 1.0)
        figures = {
            "train/loss": loss / step.denominator,
            "train/tokens": tokens,
            "data/samples": float(samples.stop),
            "data/epoch": self.source.epoch(samples.stop),
            "data/skipped": skipped,
            "perf/sample_s": made.seconds,
            **self.tokens.figures(),
            **said,
            **totals.teacher_figures(stats),
        }
        stats = stats[2 * len(totals.teachers) :]
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

    def _after_step(self, figures: dict[str, float], progress: StepProgress) -> bool:
        """Adds ``eval/…`` to ``figures`` when due; True once ``train.stop_at`` or ``train.token_budget`` is reached."""
        train, every = self.config.train, self.config.eval.every
        spent = train.token_budget is not None and self.tokens.spent >= train.token_budget
        if spent:
            progress.note(
                f"step {self.done}: {self.tokens.spent:,.0f} tokens reach train.token_budget={train.token_budget:,}"
            )
        if not every or (self.done % every and self.done != train.steps and not spent):
            return spent
        figures |= self._evaluate(progress)
        good = train.stop_at is not None and figures["eval/pass_at_1"] >= train.stop_at
        if good:
            progress.note(f"step {self.done}: pass@1 reached train.stop_at={train.stop_at}")
        return spent or good

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
