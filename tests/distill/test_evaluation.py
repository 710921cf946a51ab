"""pass@k against brute force, outcomes shared over ranks, KL to the teacher against a plain fp64 computation."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from harness import Rank, RankPool

from distill.evaluation import Outcome, pass_at_k, summarise


@pytest.mark.unit
@pytest.mark.parametrize("correct", range(6))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer(correct: int) -> None:
    flags = [i < correct for i in range(5)]
    outcomes = [Outcome(0, flag, None, 3, True) for flag in flags]
    for k in (1, 2, 5):
        subsets = list(combinations(flags, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(outcomes, 5, [k])[f"sampled_pass_at_{k}"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.unit
def test_summary_of_outcomes() -> None:
    outcomes = [Outcome(0, True, True, 4, True), Outcome(1, False, None, 8, False)]
    assert summarise(outcomes) == {"pass_at_1": 0.5, "mean_length": 6.0, "finished": 0.5, "exact_chain": 1.0}
    assert summarise([])["pass_at_1"] == 0.0


def measured(me: Rank, overrides: list[str]) -> dict[str, Any]:
    from distill.config import load_config
    from distill.eval import evaluate

    me.init("ncclx")
    return evaluate(load_config("eval", overrides))


def direct_kl(student: Path, teacher: Path, examples: int) -> float:
    """Forward KL per response token in fp64, one example at a time, straight from Hugging Face."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distill.data import build_task, data_config

    task = build_task(data_config({"name": "running_sum", "min_terms": 2, "max_terms": 6}), "test")
    tokenizer = AutoTokenizer.from_pretrained(student)
    models = [AutoModelForCausalLM.from_pretrained(path).double().eval() for path in (teacher, student)]
    total, tokens = 0.0, 0
    for example in (task[i] for i in range(examples)):
        prompt = tokenizer(example.prompt)["input_ids"]
        ids = torch.tensor([prompt + tokenizer(example.reference)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            p, q = (model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in models)
        total += float((p.exp() * (p - q)).sum())
        tokens += len(p)
    return total / tokens


@pytest.mark.dist
def test_figures_do_not_depend_on_the_world_size(
    base_overrides: list[str], tiny_models: dict[str, Path], one_rank: RankPool, two_ranks: RankPool
) -> None:
    models = [o for o in base_overrides if o.startswith(("model", "data", "rollout", "train.max_length"))]
    overrides = [*models, "eval.examples=11", "eval.samples=3", "eval.k=[1,3]", "eval.kl_examples=7"]
    alone = one_rank.run(measured, overrides)[0]
    for figures in two_ranks.run(measured, overrides):
        assert figures == pytest.approx(alone)
    assert alone["kl_teacher"] == pytest.approx(direct_kl(tiny_models["student"], tiny_models["teacher"], 7), rel=1e-4)
    assert set(alone) >= {"pass_at_1", "exact_chain", "mean_length", "sampled_pass_at_1", "sampled_pass_at_3"}
