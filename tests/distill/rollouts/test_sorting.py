"""Sorted rollouts with a real model: under equal weights every sample gets the text that a plain rollout gives it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

from distill.rollouts import Generator, SamplingParams
from distill.rollouts.pool import Pool, Response, Unit
from distill.rollouts.slot_time import SlotTime, bubble_ratio
from distill.rollouts.sorting import SortedRollouts

pytestmark = pytest.mark.unit

PER_UPDATE, UPDATES, GROUP = 3, 7, 2


def run(
    generator: Generator, other: Generator, params: SamplingParams, prompts: list[list[int]], pool: dict[str, Any]
) -> tuple[list[Response], list[SlotTime]]:
    """All updates; ``other`` (may be the same) writes in every odd one. The state goes through JSON before each."""
    units = [
        Unit(n, [Response(GROUP * n + i, prompt, GROUP * n + i) for i in range(GROUP)])
        for n, prompt in enumerate(prompts)
    ][::-1]
    taken: list[Response] = []
    times: list[SlotTime] = []
    state: list[Any] = []
    for version in range(UPDATES):
        rollouts = SortedRollouts(Pool(**pool))
        rollouts.pool.restore(json.loads(json.dumps(state)))
        writer = other if version % 2 else generator
        found, slot_time = rollouts.update(
            writer, params, PER_UPDATE, version, lambda count: [units.pop() for _ in range(min(count, len(units)))]
        )
        state = rollouts.pool.state()
        taken += [response for unit in found for response in unit.responses]
        times.append(slot_time)
    assert not units
    assert not state
    return taken, times


POOLS = [
    {"oversubscribe": 2.0, "unfinished": "partial", "max_staleness": 5},
    {"oversubscribe": 3.0, "unfinished": "partial", "max_staleness": 1},
    {"oversubscribe": 2.0, "unfinished": "drop", "max_staleness": 0},
    {"oversubscribe": 1.5, "unfinished": "drop", "max_staleness": 2},
]


@pytest.mark.parametrize("pool", POOLS, ids=["partial", "partial-young", "on-policy", "drop"])
def test_texts_are_those_of_plain_rollouts(pool: dict[str, Any], tiny: Any, text_tokenizers: Any) -> None:
    """Stop strings of two tokens, limits and ends are found across interruptions; nothing is lost or written twice."""
    tokenizer = text_tokenizers["byte_level"]
    model = tiny(vocab_size=len(tokenizer), initializer_range=0.12)
    params = SamplingParams(max_new_tokens=60, stop=("ee", "st", "th"))
    generator = Generator(model, tokenizer, slots=5)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 61) for _ in range(rng.randrange(1, 9))] for _ in range(PER_UPDATE * UPDATES)]
    taken, times = run(generator, generator, params, prompts, pool)
    assert sorted(r.sample for r in taken) == list(range(GROUP * PER_UPDATE * UPDATES))
    plain = generator.generate(
        [prompt for prompt in prompts for _ in range(GROUP)], params, range(GROUP * len(prompts))
    )
    assert {one.finish for one in plain} >= {"stop", "length"}
    for response in taken:
        expected = plain[response.sample]
        assert (response.ids, response.finish) == (expected.response_ids, expected.finish)
        assert response.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    interrupted = [r for r in taken if len(r.spans) > 1]
    assert bool(interrupted) == (pool["unfinished"] == "partial")
    assert bool(sum(time.dropped for time in times)) == (pool["unfinished"] == "drop" or pool["max_staleness"] == 1)
    kept = sum(len(r.ids) for r in taken)
    assert sum(time.busy for time in times) == kept + sum(time.dropped for time in times), (
        "every token is taken or dropped"
    )


@torch.no_grad()
def test_every_span_has_the_log_probabilities_of_the_weights_that_wrote_it(tiny: Any, ids_only: Any) -> None:
    models = [tiny(seed=seed) for seed in (0, 1)]
    generators = [Generator(model, ids_only, slots=4) for model in models]
    prompts = [[3 + n] * 3 for n in range(PER_UPDATE * UPDATES)]
    taken, _ = run(*generators, SamplingParams(max_new_tokens=50), prompts, POOLS[0])
    assert any(len({version % 2 for version, _ in r.spans}) == 2 for r in taken)
    for response in taken:
        ids = torch.tensor([response.prompt + response.ids])
        after = [m(ids).logits[0, len(response.prompt) - 1 : -1].log_softmax(-1) for m in models]
        writers = [version % 2 for version, count in response.spans for _ in range(count)]
        expected = [
            after[who][t, token].item() for t, (who, token) in enumerate(zip(writers, response.ids, strict=True))
        ]
        assert response.logprobs == pytest.approx(expected, abs=1e-4)


def test_slot_time_of_a_plain_call_is_counted_tick_by_tick(tiny: Any, ids_only: Any) -> None:
    """Three rows at once: every tick has as many busy slots as there are responses of at least that length."""
    generator = Generator(tiny(), ids_only, slots=8)
    lengths = [
        len(r.response_ids) for r in generator.generate([[5], [9], [30]], SamplingParams(max_new_tokens=40), [1, 2, 3])
    ]
    assert generator.slot_time == SlotTime(3, max(lengths), sum(lengths))
    assert bubble_ratio([generator.slot_time]) == 1 - sum(lengths) / (3 * max(lengths))


def test_a_supply_that_ends_too_soon_is_an_error(tiny: Any, ids_only: Any) -> None:
    rollouts = SortedRollouts(Pool(2.0, "drop", 0))
    supply = iter([[Unit(0, [Response(0, [3], 0)])], []])
    with pytest.raises(ValueError, match="an update of 2 units cannot be made: the pool has only 1"):
        rollouts.update(
            Generator(tiny(), ids_only), SamplingParams(max_new_tokens=4), 2, 0, lambda count: next(supply, [])
        )
