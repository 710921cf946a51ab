"""Which models run, through which forward, and that unsupported ones are refused rather than answered wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from distill.rollouts import Generator, SamplingParams
from distill.rollouts.forward import HFForward, UnsupportedModelError, build_forward
from distill.rollouts.lean import LeanForward, is_lean
from distill.rollouts.session import Session

pytestmark = pytest.mark.unit

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": 2,
}
GPT = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 96,
    "eos_token_id": 0,
    "bos_token_id": 2,
}


def make(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    model = kind(getattr(transformers, f"{name}Config")(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("GPT2", GPT),
        ("Qwen2", COMMON),
        ("Gemma", {**COMMON, "head_dim": 8}),
        ("Mistral", {**COMMON, "sliding_window": None}),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_full_attention_models_run_through_the_hugging_face_forward(
    name: str, settings: dict[str, Any], attention: str, ids_only: Any
) -> None:
    model = make(name, **settings, attn_implementation=attention)
    assert isinstance(build_forward(model), HFForward)
    prompts = [[5], [6, 7, 8, 9, 10], [11, 12], list(range(20, 40))]
    got = Generator(model, ids_only, slots=2).generate(
        prompts, SamplingParams(max_new_tokens=15, temperature=0.0), range(4)
    )
    for prompt, rollout in zip(prompts, got):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, do_sample=False, eos_token_id=0, pad_token_id=1
        )
        assert rollout.response_ids == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("Mistral", {**COMMON, "sliding_window": 16}, r"sliding-window attention \(sliding_window=16\)"),
        ("Gemma2", {**COMMON, "head_dim": 8}, "layers of type sliding_attention"),
        ("Mamba", {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1}, "MambaForCausalLM cannot be used"),
        ("Bloom", {"vocab_size": 61, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "takes no position_ids"),
        ("Falcon", {**COMMON, "alibi": True}, "does not run over the builtin engine's key-value cache"),
        (
            "Qwen2",
            {**COMMON, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "longest row",
        ),
    ],
)
def test_models_with_other_state_are_refused(name: str, settings: dict[str, Any], reason: str, ids_only: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        Generator(make(name, **settings), ids_only, context_length=64).generate([[3]], SamplingParams(), [0])


def test_a_model_that_answers_differently_with_a_cache_is_refused() -> None:
    model = make("Qwen2", **COMMON)
    attention = model.model.layers[1].self_attn
    original = attention.forward

    def forgetful(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        out = original(*args, past_key_values=past_key_values, **kwargs)
        return (out[0] * 0.5, *out[1:]) if past_key_values is not None else out

    attention.forward = forgetful
    with pytest.raises(UnsupportedModelError, match="gives other logits with a ragged key-value cache"):
        build_forward(model)


def test_unsupported_attention_kernels_are_named() -> None:
    model = make("Qwen2", **COMMON)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"'flash_attention_2'.*attn_implementation='sdpa'"):
        build_forward(model)


def test_lean_forward_is_for_exact_classes_without_hooks(tiny: Any) -> None:
    for name in ("qwen3", "llama"):
        model = tiny(name)
        assert isinstance(build_forward(model), LeanForward)
        assert isinstance(build_forward(model, lean=False), HFForward)
        handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: None)
        assert not is_lean(model)
        handle.remove()
        assert is_lean(model)
    derived = type("Derived", (transformers.LlamaForCausalLM,), {})(tiny("llama").config)
    assert not is_lean(derived)
    with_window = transformers.Qwen3ForCausalLM(
        tiny().config.__class__(
            **{**COMMON, "head_dim": 8}, use_sliding_window=True, sliding_window=8, max_window_layers=1
        )
    )
    with pytest.raises(UnsupportedModelError, match="sliding_attention"):
        build_forward(with_window)


@pytest.mark.parametrize("limit", [0, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_lean_logits_match_hugging_face(
    tiny: Any, name: str, dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill, ragged continuation and decode step, with joined and with separate weight matrices."""
    monkeypatch.setattr("distill.rollouts.lean._JOIN_LIMIT", limit)
    model = tiny(name, initializer_range=0.1, attention_bias=True).to(dtype)
    prompts = [[5, 6, 7, 8], [9], [10, 11], list(range(12, 30))]
    pairs = []
    for lean in (True, False):
        session = Session(model, slots=4, lean=lean)
        rows = session.open([[]] * 4)
        pieces = session.score(rows, prompts) + session.score(rows[::-1], [[3, 4], [5], [6, 7, 8, 9], []])
        pairs.append([*pieces, session.next_logits(rows)])
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 0.15}[
        dtype
    ]  # rotary tables are fp32 in both
    for mine, theirs in zip(*pairs):
        assert mine.dtype == theirs.dtype == dtype
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=0)


def test_lora_adapters_take_part(tiny: Any, ids_only: Any) -> None:
    import peft

    base = tiny()
    plain = Generator(base, ids_only).generate([[4, 5, 6]], SamplingParams(max_new_tokens=12, temperature=0.0), [0])[0]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    engine = Generator(model, ids_only)
    (adapted,) = engine.generate([[4, 5, 6]], SamplingParams(max_new_tokens=12, temperature=0.0), [0])
    ids = torch.tensor([[4, 5, 6]])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=1
    )
    assert adapted.response_ids == out[0, 3:].tolist()
    assert adapted.response_ids != plain.response_ids


def test_prompt_tuning_is_refused(tiny: Any, ids_only: Any) -> None:
    import peft

    model = peft.get_peft_model(tiny(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UnsupportedModelError, match="virtual prompt tokens"):
        Generator(model, ids_only)
