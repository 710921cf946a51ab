"""Batched generation: prompts in, rollouts out, in the order of the prompts.

    rollouts = Generator(model, tokenizer, slots=64).generate(prompts, SamplingParams(temperature=0.6), seeds=range(len(prompts)))

At most ``slots`` rows are in flight; rows leave when they end and waiting prompts take their place. Each sample depends on
its prompt, its seed and the weights only (see `sampling`). For step-wise control use `Session` and `Flight`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.rollouts.flight import Flight, Segment
from distill.rollouts.forward import check_supported, unwrap
from distill.rollouts.rollout import Rollout
from distill.rollouts.sampling import SamplingParams
from distill.rollouts.session import Session, resolve_context
from distill.rollouts.slot_time import SlotTime
from distill.rollouts.stops import StopMatcher

REFILL_SHARE = 8
"""Waiting prompts enter once an eighth of the slots is free: a prefill costs a tiny model as much as a decode step."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every sub-module; afterwards each is back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id that ends a text: those of the generation config and the tokenizer's own."""
    config = unwrap(model).generation_config
    named = None if config is None else config.eos_token_id
    ids = {named} if isinstance(named, int) else set(named or ())
    return ids | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def open_shared(session: Session, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Open one row per prompt and prefill it; equal neighbours are computed once and copied."""
    firsts = [i for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]]
    opened = session.open([prompts[i] for i in firsts])
    session.prefill(opened)
    rows: list[int] = []
    for row, first, after in zip(opened, firsts, [*firsts[1:], len(prompts)]):
        rows += [row, *session.fork(row, after - first - 1)]
    return rows


class Generator:
    """The built-in rollout engine for one model.

    ``context_length`` defaults to the model's; it bounds prompt plus response. ``lean=False`` keeps to the Hugging Face
    forward, for comparison. The model is used where it is (device, dtype) and as it is at each `generate` call.

    Raises ``ValueError`` for a context beyond the model's, `UnsupportedModelError` (here or at the first `generate`) for a
    model whose cache is not plain full attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int = 64,
        context_length: int | None = None,
        lean: bool = True,
    ) -> None:
        if slots < 1:
            raise ValueError(f"rollout: slots must be at least 1, not {slots}")
        self.model, self.tokenizer, self.slots, self.lean = model, tokenizer, slots, lean
        check_supported(unwrap(model))
        self.context_length = resolve_context(unwrap(model), context_length)
        self.eos = eos_ids(model, tokenizer)
        self._matcher: StopMatcher | None = None
        self.slot_time = SlotTime()  # of the last `generate`

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt, in order.

        ``seeds[i]`` (any int) and the token position decide the randomness of prompt ``i``. An empty prompt starts from the
        tokenizer's BOS where it has one. A response is cut where prompt and response reach the context.
        ``progress(done, total)`` is called as rollouts end. Raises ``ValueError`` for a prompt that leaves no room
        in the context, is empty without BOS, or for seeds that do not match the prompts; `FloatingPointError` when the
        model's logits are not finite.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"rollout: {len(prompts)} prompts but {len(seeds)} seeds; each prompt needs one")
        starts = [self._start(index, prompt) for index, prompt in enumerate(prompts)]
        if not starts:
            self.slot_time = SlotTime()
            return []
        results: list[Rollout | None] = [None] * len(starts)
        done = 0
        with eval_mode(self.model):
            for index, segment in self._fly(starts, params, seeds):
                results[index] = Rollout(
                    starts[index], segment.ids, segment.logprobs, segment.finish, segment.stop_string
                )
                done += 1
                if progress is not None:
                    progress(done, len(starts))
        return [rollout for rollout in results if rollout is not None]

    def _fly(
        self, prompts: list[list[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Segment]]:
        """(prompt index, what was sampled), as rows end."""
        session, flight = self.flight(params, len(prompts))
        self.slot_time = SlotTime(session.slots)
        # Longest first: neighbours in flight have similar lengths, and equal prompts meet and share their prefill.
        waiting = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), prompts[index], -index))
        owner: dict[int, int] = {}
        while waiting or flight:
            if waiting and (not flight or session.free * REFILL_SHARE >= session.slots):
                entering = [waiting.pop() for _ in range(min(session.free, len(waiting)))]
                rows = open_shared(session, [prompts[index] for index in entering])
                flight.add(rows, [seeds[index] for index in entering])
                owner.update(zip(rows, entering))
            self.slot_time.tick(len(flight))
            for segment in flight.step():
                session.close([segment.row])
                yield owner.pop(segment.row), segment

    def flight(self, params: SamplingParams, most: int) -> tuple[Session, Flight]:
        """An empty session over the model as it is now, of ``slots`` rows or ``most`` if that is fewer, and a flight over it."""
        slots = min(self.slots, most)
        session = Session(self.model, slots=slots, context_length=self.context_length, lean=self.lean)
        return session, Flight(session, params, sorted(self.eos), self._matched(params.stop))

    def _matched(self, stop: tuple[str, ...]) -> StopMatcher | None:
        """The matcher for these stop strings; kept from call to call, as it has read the whole vocabulary."""
        if stop and (self._matcher is None or self._matcher.stop != stop):
            self._matcher = StopMatcher(self.tokenizer, stop)
        return self._matcher if stop else None

    def _start(self, index: int, prompt: Sequence[int]) -> list[int]:
        ids = [int(token) for token in prompt]
        if not ids:
            if self.tokenizer.bos_token_id is None:
                raise ValueError(f"rollout: prompt {index} is empty and the tokenizer has no BOS token to start from")
            ids = [int(self.tokenizer.bos_token_id)]
        if len(ids) >= self.context_length:
            raise ValueError(
                f"rollout: prompt {index} has {len(ids)} tokens and leaves no room in the context of {self.context_length}; "
                "shorten it or raise the context length"
            )
        return ids
