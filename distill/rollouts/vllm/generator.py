"""Plain rollouts by a server: prompts in, rollouts out, as the built-in `Generator` gives them.

    generator = VllmGenerator(Decoder(server, eos, most=None), tokenizer, slots=64, context_length=4096)
    rollouts = generator.generate(prompts, params, seeds)

``slots`` requests are under way at once; the server batches them as it sees fit. A response depends on its prompt, its seed
and the weights, but for the rounding of a batch of another shape. vLLM draws by random numbers of its own: sampled responses
differ from the built-in engine's, and greedy ones only where two tokens are all but tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.errors import ServerError
from distill.rollouts.rollout import Finish, Rollout
from distill.rollouts.sampling import SamplingParams
from distill.rollouts.stops import StopMatcher
from distill.rollouts.vllm.client import Generated, Server
from distill.seeds import mix

T = TypeVar("T")


class Decoder:
    """Continues token ids through a server, and tells how they end as the built-in engine does.

    ``eos`` are the ids that end a text; ``most``: only ids below it are drawn (what another model must be able to read).
    """

    def __init__(self, server: Server, eos: set[int], most: int | None) -> None:
        self.server, self.eos, self.most = server, eos, most

    def run(
        self, ids: Sequence[int], limit: int, seed: int, params: SamplingParams, matcher: StopMatcher | None
    ) -> Rollout:
        """At most ``limit`` tokens after ``ids``. The randomness follows from the seed and the position. Raises ServerError."""
        found = self.server.generate(ids, limit, mix(seed, len(ids)), params, sorted(self.eos), self.most)
        length, finish, stop = self._end(found, limit, matcher)
        return Rollout(list(ids), found.ids[:length], found.logprobs[:length], finish, stop)

    def _end(self, found: Generated, limit: int, matcher: StopMatcher | None) -> tuple[int, Finish, str | None]:
        """(tokens that count, why it ended, stop string): by the token that ended it, whatever text the server saw."""
        suspects = np.zeros(len(found.ids), dtype=bool) if matcher is None else matcher.suspects(np.array(found.ids))
        for position, token in enumerate(found.ids):
            if token in self.eos:
                return position + 1, "eos", None
            stop = matcher.find(found.ids[: position + 1]) if matcher is not None and suspects[position] else None
            if stop is not None:
                return position + 1, "stop", stop
        if len(found.ids) < limit:
            raise ServerError(
                f"{self.server.http.name} ended a text after {len(found.ids)} of {limit} tokens ({found.reason}), where this run "
                "sees neither an end token nor a stop string; does it serve the tokenizer and generation config of "
                f"model.{self.server.who}.path?"
            )
        return limit, "length", None


class VllmGenerator:
    """``context_length`` bounds prompt plus response."""

    def __init__(
        self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, *, slots: int, context_length: int
    ) -> None:
        self.decoder, self.tokenizer, self.slots, self.context_length = decoder, tokenizer, slots, context_length
        self._matcher: StopMatcher | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt, in order; ``progress(done, total)`` as they end.

        Raises ``ValueError`` for a prompt that is empty or leaves no room in the context, or seeds that do not match; ServerError.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"rollout: {len(prompts)} prompts but {len(seeds)} seeds; each prompt needs one")
        check_prompts(prompts, self.context_length)
        if params.stop and (self._matcher is None or self._matcher.stop != params.stop):
            self._matcher = StopMatcher(self.tokenizer, params.stop)
        matcher = self._matcher if params.stop else None

        def write(number: int) -> Rollout:
            prompt = [int(token) for token in prompts[number]]
            limit = min(params.max_new_tokens, self.context_length - len(prompt))
            return self.decoder.run(prompt, limit, seeds[number], params, matcher)

        results: dict[int, Rollout] = {}
        for number, rollout in side_by_side(write, len(prompts), self.slots):
            results[number] = rollout
            if progress is not None:
                progress(len(results), len(prompts))
        return [results[number] for number in range(len(prompts))]


def check_prompts(prompts: Sequence[Sequence[int]], context: int) -> None:
    """Raises ``ValueError`` for a prompt that is empty or leaves no room in the context."""
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < context:
            raise ValueError(
                f"rollout: prompt {number} has {len(prompt)} tokens; the context of {context} allows 1 to {context - 1}: "
                "shorten it or raise the context length"
            )


def side_by_side(work: Callable[[int], T], count: int, slots: int) -> Iterator[tuple[int, T]]:
    """(number, ``work(number)``) for every number below ``count``, as they end; ``slots`` at a time, each in a thread.

    The first exception is raised here; what has not begun by then is not begun.
    """
    with ThreadPoolExecutor(max_workers=max(1, min(slots, count)), thread_name_prefix="rollout") as pool:
        futures = {pool.submit(work, number): number for number in range(count)}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        finally:
            for future in futures:
                future.cancel()
