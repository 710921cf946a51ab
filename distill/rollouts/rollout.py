"""What a rollout engine returns for one prompt."""

from dataclasses import dataclass, field
from typing import Literal

Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response.

    ``response_ids`` holds everything that was sampled: the EOS id when the model ended the text itself, and all
    tokens of the stop string when one was found (the token that completes a stop string is kept whole, so the
    text may run a few characters past it).

    ``logprobs[t]`` is ``log_softmax(logits)[response_ids[t]]`` in float32, in nats, under the model as it is:
    **before** temperature, top-p and top-k. This is the policy's own log-probability, the one a trainer recomputes
    from the same tokens; it is not the density of the truncated or tempered distribution the token was drawn from.

    ``finish`` says why it ended: ``eos`` (an EOS id was sampled), ``stop`` (``stop_string`` appeared in the text) or
    ``length`` (the token limit or the context was reached). A token that is an EOS id counts as ``eos`` even if
    its text also completes a stop string, and both win over ``length``.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    finish: Finish
    stop_string: str | None


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A response that the student and a teacher wrote together.

    Attributes:
        ids: token ids of the response, whoever wrote them.
        supervised: which of them a loss looks at, one flag each; None: all.
        logprobs: the student's log-probability of each (nats, temperature 1); None where it was not computed.
        finished: it ended by itself, not at a limit.
        notes: figures of how it was made (``{"breach": 1.0}``), for the log. ``student_tokens`` and ``teacher_tokens`` say how
            many tokens either model decoded for it, discarded ones included; without them all count as the student's text.
        accepted_ids: the response without what was taken back, which is what a verifier judges; None: ``ids``.
    """

    ids: list[int]
    supervised: list[bool] | None = None
    logprobs: list[float] | None = None
    finished: bool = True
    notes: dict[str, float] = field(default_factory=dict)
    accepted_ids: list[int] | None = None
