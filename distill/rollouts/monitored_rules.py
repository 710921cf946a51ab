"""What happens next to one monitored trajectory: the decisions that every engine makes alike.

An engine decodes and scores; how many tokens it may, with which seed, when a trajectory ends, who writes after a breach and from
where follows from the options and the trajectory (`Draft`) alone:

    limit, seed = rules.explore_limit(draft), rules.explore_seed(draft)     # the student's next step
    kept = rules.hand_over(draft)                                           # after a breach; None: no room for a correction
    last = rules.writes_on(draft)                                           # the teacher writes to the end, or one step
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.rollouts.monitored_options import MonitorOptions
from distill.rollouts.monitored_trajectory import Draft, Marker
from distill.rollouts.rollout import Finish
from distill.rollouts.sampling import SamplingParams
from distill.seeds import mix

STUDENT, TEACHER = 31, 32  # purposes of the seeds after a takeover


@dataclass(frozen=True, slots=True)
class Rules:
    """``whole`` are the caller's parameters (budget, stop strings that end a trajectory); ``context`` bounds prompt and text."""

    options: MonitorOptions
    whole: SamplingParams
    marker: Marker
    student_eos: set[int]
    context: int

    def left(self, draft: Draft) -> int:
        """Tokens that the budget of the trajectory and the context still allow."""
        budget = self.whole.max_new_tokens - len(draft.accepted)
        return min(budget, self.context - len(draft.prompt) - len(draft.text))

    def explore_limit(self, draft: Draft) -> int:
        """Tokens of the student's next step."""
        return min(self.options.step_tokens, self.left(draft))

    def explore_seed(self, draft: Draft) -> int:
        """The first stretch draws as a plain rollout with this seed does; after a takeover the seed is a new one, as the same
        positions are drawn again.
        """
        return mix(draft.seed, STUDENT, len(draft.takeovers)) if draft.takeovers else draft.seed

    def end(self, draft: Draft, finish: Finish, stop_string: str | None) -> Finish | None:
        """Why the trajectory ends with the segment that ended so, and that it already holds; None where it goes on."""
        if finish == "eos" or (finish == "stop" and stop_string in self.whole.stop):
            return finish
        return "length" if self.left(draft) < 1 else None

    def hand_over(self, draft: Draft) -> tuple[int, int] | None:
        """Take the text back to t* of the breach just judged: (step index t*, accepted tokens that both models go back to).

        None where the context leaves no room for a correction; that is noted, and the student's steps stand.
        """
        target = draft.target(self.options)
        flawed = draft.flawed_text(self.marker, self.student_eos) if self.options.keep_flawed else None
        kept = draft.kept(target)
        text = kept if flawed is None else len(flawed[0]) + len(flawed[1])
        if self.context - len(draft.prompt) - text < 1:
            draft.forgo(target)
            return None
        draft.take_back(target, flawed, self.options.mask_flawed)
        return target, kept

    def writes_on(self, draft: Draft) -> bool:
        """Whether the takeover that begins is the last one: the teacher writes to the end."""
        most = self.options.max_breaches
        return most > 0 and len(draft.takeovers) + 1 >= most

    def takeover_limit(self, draft: Draft) -> int:
        """Tokens of the takeover that begins."""
        budget = self.whole.max_new_tokens - len(draft.accepted)
        if self.writes_on(draft):
            budget = max(budget, self.options.suffix_floor)
        else:
            budget = min(budget, self.options.step_tokens)
        return min(budget, self.context - len(draft.prompt) - len(draft.text))

    def takeover_seed(self, draft: Draft) -> int:
        """Seed of the takeover that begins."""
        return mix(draft.seed, TEACHER, len(draft.takeovers))
