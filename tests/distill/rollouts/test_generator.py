"""`Generator` against ``model.generate``, a full forward pass, and itself under other batch compositions."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from distill.rollouts import Generator, Rollout, SamplingParams
from distill.rollouts.sampling import draw, seed_keys, uniforms

pytestmark = pytest.mark.unit

EOS, PAD = 0, 1


def prompts_of(count: int, seed: int = 0, longest: int = 24) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 61) for _ in range(rng.randrange(1, longest + 1))] for _ in range(count)]


def cut(ids: list[int], eos: set[int]) -> list[int]:
    ends = [i for i, token in enumerate(ids) if token in eos]
    return ids[: ends[0] + 1] if ends else ids


@torch.no_grad()
def hf_greedy(model: Any, prompts: list[list[int]], limit: int, eos: set[int]) -> list[list[int]]:
    """``model.generate`` on one left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, eos_token_id=sorted(eos), pad_token_id=PAD
    )
    return [cut(row, eos) for row in out[:, width:].tolist()]


MODELS = [
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("qwen3", {"num_key_value_heads": 4, "head_dim": 16, "attention_bias": True}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "mlp_bias": True, "attention_bias": True}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
]


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize(("name", "changes"), MODELS)
def test_greedy_equals_hf_generate(tiny: Any, ids_only: Any, name: str, changes: dict[str, Any], lean: bool) -> None:
    model = tiny(name, **changes)
    model.generation_config.eos_token_id = [5, 17, 23]
    prompts = prompts_of(14)
    engine = Generator(model, ids_only, slots=5, lean=lean)
    assert engine.eos == {EOS, 5, 17, 23}
    rollouts = engine.generate(prompts, SamplingParams(max_new_tokens=30, temperature=0.0), range(14))
    singles = [hf_greedy(model, [prompt], 30, engine.eos)[0] for prompt in prompts]
    assert [rollout.response_ids for rollout in rollouts] == singles
    assert singles == hf_greedy(model, prompts, 30, engine.eos)
    for prompt, rollout in zip(prompts, rollouts):
        ended = rollout.response_ids[-1] in engine.eos
        assert rollout.finish == ("eos" if ended else "length")
        assert rollout.stop_string is None
        assert rollout.prompt_ids == prompt
        assert ended or len(rollout.response_ids) == 30
    assert len({len(ids) for ids in singles}) >= 2


def test_the_greedy_cases_cover_eos_and_length(tiny: Any, ids_only: Any) -> None:
    finishes = set()
    for name, changes in MODELS:
        model = tiny(name, **changes)
        model.generation_config.eos_token_id = [5, 17, 23]
        params = SamplingParams(max_new_tokens=30, temperature=0.0)
        finishes |= {r.finish for r in Generator(model, ids_only).generate(prompts_of(14), params, range(14))}
    assert finishes == {"eos", "length"}


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_samples_do_not_depend_on_slots_order_or_company(tiny: Any, ids_only: Any, name: str) -> None:
    model, params = tiny(name), SamplingParams(max_new_tokens=25, temperature=0.9, top_p=0.9, top_k=20)
    prompts, seeds = prompts_of(17, seed=3), [7 * i for i in range(17)]
    reference = [
        Generator(model, ids_only, slots=1).generate([prompt], params, [seed])[0]
        for prompt, seed in zip(prompts, seeds)
    ]
    for slots in (1, 4, 64):
        engine = Generator(model, ids_only, slots=slots)
        order = random.Random(slots).sample(range(17), 17)
        got = engine.generate([prompts[i] for i in order], params, [seeds[i] for i in order])
        for i, rollout in zip(order, got):
            assert rollout.response_ids == reference[i].response_ids
            np.testing.assert_allclose(rollout.logprobs, reference[i].logprobs, atol=1e-4)
    assert len({tuple(r.response_ids) for r in reference}) == 17


def test_each_token_is_the_documented_draw(tiny: Any, ids_only: Any) -> None:
    """Seed and absolute position name the uniform; logits come from a plain forward; log-probs are untempered."""
    model, params = tiny(), SamplingParams(max_new_tokens=20, temperature=0.7, top_p=0.8)
    prompts, seeds = prompts_of(6, seed=4), [0, 1, -5, 2**70, 3, 4]
    for rollout, seed in zip(Generator(model, ids_only, slots=3).generate(prompts, params, seeds), seeds):
        whole = rollout.prompt_ids + rollout.response_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole])).logits[0]
        positions = np.arange(len(rollout.prompt_ids), len(whole))
        uniform = torch.from_numpy(uniforms(seed_keys([seed]), positions))
        tokens, _ = draw(logits[positions - 1], params, uniform)
        assert tokens.tolist() == rollout.response_ids
        expected = logits.double().log_softmax(-1)[positions - 1, tokens]
        np.testing.assert_allclose(rollout.logprobs, expected, atol=2e-5)


def test_sampled_frequencies_match_the_model(tiny: Any, ids_only: Any) -> None:
    model, count = tiny(initializer_range=0.1), 6000
    prompt = [4, 8, 15, 16, 23, 42]
    rollouts = Generator(model, ids_only, slots=count).generate(
        [prompt] * count, SamplingParams(max_new_tokens=1), range(count)
    )
    with torch.no_grad():
        p = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
    observed = np.bincount([r.response_ids[0] for r in rollouts], minlength=61)
    keep = p * count > 5
    chi_square = ((observed - p * count)[keep] ** 2 / (p * count)[keep]).sum()
    degrees = keep.sum() - 1
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)


def test_equal_prompts_share_their_prefill(tiny: Any, ids_only: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.rollouts.session import Session

    model, params = tiny(), SamplingParams(max_new_tokens=10)
    prompts = [prompts_of(1, seed=9)[0]] * 6 + prompts_of(2, seed=10)
    fed: list[int] = []
    feed = Session._feed

    def counting(self: Session, rows: Any, tokens: Any, *, logits: bool) -> Any:
        fed.extend(len(new) for new in tokens)
        return feed(self, rows, tokens, logits=logits)

    monkeypatch.setattr(Session, "_feed", counting)
    got = Generator(model, ids_only, slots=8).generate(prompts, params, range(8))
    assert sorted(fed) == sorted(len(prompt) - 1 for prompt in {tuple(p) for p in prompts})
    alone = [Generator(model, ids_only, slots=1).generate([p], params, [i])[0] for i, p in enumerate(prompts)]
    assert [r.response_ids for r in got] == [r.response_ids for r in alone]


def stop_oracle(engine: Generator, rollout: Rollout, stops: tuple[str, ...]) -> tuple[list[int], str]:
    """What a run without stop strings becomes when every prefix is decoded and searched."""
    for size in range(1, len(rollout.response_ids) + 1):
        ids = rollout.response_ids[:size]
        if ids[-1] in engine.eos:
            return ids, "eos"
        if any(stop in str(engine.tokenizer.decode(ids)) for stop in stops):
            return ids, "stop"
    return rollout.response_ids, "length"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_stop_strings_end_a_response_and_stay_in_it(tiny: Any, text_tokenizers: Any, kind: str) -> None:
    tokenizer = text_tokenizers[kind]
    model = tiny(vocab_size=len(tokenizer) + 7, initializer_range=0.1)  # a padded vocabulary
    engine = Generator(model, tokenizer, slots=7)
    prompts = [[3 + i] for i in range(24)]
    free = engine.generate(prompts, SamplingParams(max_new_tokens=40), range(24))
    seen = set()
    for stops in ((" ",), ("e", "ρ"), ("�n",), ("he", "er", "re", "\n"), ("東",)):
        params = SamplingParams(max_new_tokens=40, stop=stops)
        for before, after in zip(free, engine.generate(prompts, params, range(24))):
            ids, finish = stop_oracle(engine, before, stops)
            assert (after.response_ids, after.finish) == (ids, finish)
            assert len(after.logprobs) == len(ids)
            assert (after.stop_string is not None) == (finish == "stop")
            assert after.stop_string is None or after.stop_string in str(tokenizer.decode(ids))
            seen.add(finish)
    assert {"stop", "length"} <= seen


def test_eos_is_told_from_a_stop_string_with_its_text(tiny: Any, text_tokenizers: Any) -> None:
    tokenizer = text_tokenizers["byte_level"]
    model = tiny(vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.pad_token_id] = 0
        model.lm_head.weight[3:] *= 0.01
    params = SamplingParams(max_new_tokens=60, stop=("<eos>", "<bos>"))
    rollouts = Generator(model, tokenizer).generate([[5]] * 30, params, range(30))
    by_last = {r.response_ids[-1]: (r.finish, r.stop_string) for r in rollouts if r.finish != "length"}
    assert by_last[tokenizer.eos_token_id] == ("eos", None)
    assert by_last[tokenizer.bos_token_id] == ("stop", "<bos>")


def test_responses_are_cut_at_the_context(tiny: Any, ids_only: Any) -> None:
    model = tiny(eos_token_id=None)
    engine = Generator(model, ids_only, slots=2, context_length=20)
    engine.eos = set()
    prompts = [list(range(3, 3 + size)) for size in (19, 12, 4)]
    got = engine.generate(prompts, SamplingParams(max_new_tokens=10), range(3))
    assert [(len(r.response_ids), r.finish) for r in got] == [(1, "length"), (8, "length"), (10, "length")]
    with pytest.raises(ValueError, match="prompt 1 has 20 tokens and leaves no room in the context of 20"):
        engine.generate([prompts[0], list(range(3, 23))], SamplingParams(), [0, 1])
    with pytest.raises(ValueError, match=r"outside 1..96"):
        Generator(model, ids_only, context_length=97)


def test_empty_input(tiny: Any, ids_only: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Generator(tiny(), ids_only)
    params = SamplingParams(max_new_tokens=3)
    assert engine.generate([], params, []) == []
    (from_bos,) = engine.generate([[]], params, [1])
    assert from_bos.prompt_ids == [ids_only.bos_token_id]
    assert from_bos == engine.generate([[ids_only.bos_token_id]], params, [1])[0]
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        engine.generate([[3], [4]], params, [0])
    monkeypatch.setattr(type(ids_only), "bos_token_id", None, raising=False)
    with pytest.raises(ValueError, match="prompt 1 is empty and the tokenizer has no BOS"):
        engine.generate([[3], []], params, [0, 1])


def test_training_goes_on_unharmed(tiny: Any, ids_only: Any) -> None:
    for lean in (True, False):
        model = tiny(attention_dropout=0.5).train()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        engine = Generator(model, ids_only, lean=lean)
        params = SamplingParams(max_new_tokens=8)
        assert engine.generate([[4, 5], [6]], params, [1, 2]) == engine.generate([[4, 5], [6]], params, [1, 2])
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
        model(input_ids=torch.tensor([[4, 5, 6]]), labels=torch.tensor([[4, 5, 6]])).loss.backward()
        assert all(p.grad is not None for p in model.parameters())


def test_new_weights_are_used_by_the_next_call(tiny: Any, ids_only: Any) -> None:
    model, other = tiny(seed=1), tiny(seed=2)
    engine, params = Generator(model, ids_only), SamplingParams(max_new_tokens=12, temperature=0.0)
    engine.generate([[4, 5]], params, [0])
    model.load_state_dict(other.state_dict())
    assert engine.generate([[4, 5]], params, [0]) == Generator(other, ids_only).generate([[4, 5]], params, [0])


def test_modes_are_restored_and_nan_is_reported(tiny: Any, ids_only: Any) -> None:
    model = tiny().train()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"logits for row . at position . are not finite"):
        Generator(model, ids_only).generate([[4, 5], [6]], SamplingParams(), [1, 2])
    assert all(module.training for module in model.modules())


def test_progress_counts_finished_prompts(tiny: Any, ids_only: Any) -> None:
    calls: list[tuple[int, int]] = []
    params = SamplingParams(max_new_tokens=9)
    Generator(tiny(), ids_only, slots=3).generate(prompts_of(8), params, range(8), lambda *call: calls.append(call))
    assert calls == [(i, 8) for i in range(1, 9)]


def test_bf16_logprobs_stay_close_to_a_full_forward(tiny: Any, ids_only: Any) -> None:
    for name in ("qwen3", "llama"):
        model = tiny(name, initializer_range=0.1).bfloat16()
        prompts = prompts_of(6)
        for rollout in Generator(model, ids_only, slots=4).generate(
            prompts, SamplingParams(max_new_tokens=16), range(6)
        ):
            whole = rollout.prompt_ids + rollout.response_ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole])).logits[0].float()
            expected = logits.log_softmax(-1)[len(rollout.prompt_ids) - 1 : -1]
            expected = expected.gather(1, torch.tensor(rollout.response_ids)[:, None]).squeeze(1)
            assert (torch.tensor(rollout.logprobs) - expected).abs().max() < 0.1
