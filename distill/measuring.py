"""Measurements on held-out problems while a run trains, and reasons to end it early.

held_out = HeldOut(config, parts, engine, monitors)
before = held_out.measure(0, progress)                    # `eval/…`
figures, ended = held_out.after_step(done, tokens, progress)
"""

from __future__ import annotations

from distill.assembly import Parts
from distill.config import RunConfig
from distill.engine import TrainEngine
from distill.evaluation import Evaluator
from distill.monitors import Monitors
from distill.progress import StepProgress


class HeldOut:
    """Measures on the end of the held-out split; ``distill eval`` starts from its front. All ranks call it together."""

    def __init__(self, config: RunConfig, parts: Parts, engine: TrainEngine, monitors: Monitors) -> None:
        self.config, self.parts, self.engine, self.monitors = config, parts, engine, monitors
        self.evaluator = Evaluator(config, parts.held_out, parts.tokenizer, in_training=True)
        self.last: dict[str, float] = {}

    def measure(self, done: int, progress: StepProgress) -> dict[str, float]:
        """``eval/…`` of the student as it is now."""
        with self.engine.plain_student() as student:
            self.last = self.evaluator.measure(student, self.parts.teacher)
        progress.note(f"step {done}: " + "  ".join(f"{name} {value:.4g}" for name, value in self.last.items()))
        figures = {f"eval/{name}": value for name, value in self.last.items()}
        for line in self.monitors.after_evaluation(figures):
            progress.note(f"step {done}: {line}")
        return figures

    def after_step(self, done: int, spent: float, progress: StepProgress) -> tuple[dict[str, float], bool]:
        """``eval/…`` where due; and whether ``train.stop_at`` or, by the tokens ``spent``, ``train.token_budget`` is reached."""
        train, every = self.config.train, self.config.eval.every
        all_spent = train.token_budget is not None and spent >= train.token_budget
        if all_spent:
            progress.note(f"step {done}: {spent:,.0f} tokens reach train.token_budget={train.token_budget:,}")
        if not every or (done % every and done != train.steps and not all_spent):
            return {}, all_spent
        figures = self.measure(done, progress)
        good = train.stop_at is not None and figures["eval/pass_at_1"] >= train.stop_at
        if good:
            progress.note(f"step {done}: pass@1 reached train.stop_at={train.stop_at}")
        return figures, all_spent or good
