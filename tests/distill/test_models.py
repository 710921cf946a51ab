"""Loading, fitting together, adapters and export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import Rank, RankPool
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.data import TokenSequence, char_tokenizer, collate
from distill.errors import ModelError
from distill.models import TargetLogits, check_tokenizers, final_logits


def sequences() -> list[TokenSequence]:
    return [TokenSequence([3, 4, 5, 6, 1], 2, "a"), TokenSequence([7, 8, 9, 2, 3, 4, 1], 3, "b")]


@pytest.mark.unit
@pytest.mark.parametrize("pack_length", [None, 32])
def test_target_logits_are_the_models_own(tiny_models: dict[str, Path], pack_length: int | None) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["student"]).eval()
    batch = collate(sequences(), 0, pack_length)
    with torch.no_grad():
        found = TargetLogits(model)(batch)
        expected = [model(torch.tensor([each.ids])).logits[0, each.prompt_length - 1 : -1] for each in sequences()]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert batch.target_ids.tolist() == [t for each in sequences() for t in each.ids[each.prompt_length :]]


@pytest.mark.unit
def test_soft_caps_and_scales_are_applied() -> None:
    """Gemma-2 caps its logits, Cohere scales them: leaving that out would distil the wrong distribution."""
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    small = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    small |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    ids = torch.tensor([[3, 5, 7, 2]])
    gemma = Gemma2ForCausalLM(Gemma2Config(**small, final_logit_softcapping=0.05)).eval()
    cohere = CohereForCausalLM(CohereConfig(**small, logit_scale=0.3)).eval()
    for model in (gemma, cohere):
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids).last_hidden_state[0]
            torch.testing.assert_close(final_logits(model, hidden), model(ids).logits[0])


@pytest.mark.unit
def test_tokenizers_of_one_family_pass_and_others_do_not() -> None:
    ours, longer = char_tokenizer("0123456789"), char_tokenizer("0123456789+-")
    check_tokenizers(ours, longer)
    check_tokenizers(longer, ours)
    with pytest.raises(ModelError, match="differ in 2 of their first"):
        check_tokenizers(ours, char_tokenizer("1023456789"))


def trained(me: Rank, overrides: list[str]) -> list[float]:
    from distill.config import load_config
    from distill.metrics import read_metrics
    from distill.train import train

    me.init("ncclx")
    config = load_config("config", overrides)
    train(config)
    return [row["train/loss"] for row in read_metrics(Path(config.run.dir) / "metrics.jsonl")]


@pytest.mark.dist
def test_padded_vocabulary_of_the_teacher_is_cut_to_the_shared_prefix(
    base_overrides: list[str],
    make_model: Callable[..., Path],
    tiny_models: dict[str, Path],
    one_rank: RankPool,
    tmp_path: Path,
) -> None:
    """A teacher with 7 more rows of padding gives the loss of the same teacher without them."""
    wide = AutoModelForCausalLM.from_pretrained(tiny_models["wide"])
    cut = make_model(tmp_path / "cut", 0, hidden_size=24)
    narrow = AutoModelForCausalLM.from_pretrained(cut)
    weights = {
        name: tensor[:17] if "embed" in name or "lm_head" in name else tensor
        for name, tensor in wide.state_dict().items()
    }
    narrow.load_state_dict(weights)
    narrow.save_pretrained(str(cut))
    run = [*base_overrides, "method=gkd", "train.steps=2"]
    losses = [
        one_rank.run(trained, [*run, f"model.teacher.path={path}", f"run.dir={tmp_path}/{name}"])[0]
        for name, path in (("wide-run", tiny_models["wide"]), ("cut-run", cut))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.dist
def test_lora_is_merged_into_the_final_model(
    base_overrides: list[str], tiny_models: dict[str, Path], two_ranks: RankPool, tmp_path: Path
) -> None:
    """``final/`` is a plain causal LM equal to base + adapter; the adapter alone is kept too; the base did not move."""
    from peft import PeftModel

    options = [
        "model.lora.enabled=true",
        "model.lora.rank=4",
        "method=off_policy",
        "engine.lr=0.05",
        "engine.zero_stage=3",
    ]
    losses = two_ranks.run(trained, [*base_overrides, *options, "train.steps=8", f"run.dir={tmp_path}/run"])[0]
    assert losses[-1] < losses[0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    base = AutoModelForCausalLM.from_pretrained(tiny_models["student"])
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "run" / "final" / "adapter"))(ids).logits
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "final").eos_token == "<eos>"
