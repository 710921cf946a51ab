"""Packed and padded batches against each sequence alone, on real Hugging Face models."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from distill.data import PackingLeak, TokenSequence, check_packing, collate
from distill.data.packing import first_fit_decreasing

pytestmark = pytest.mark.unit

VOCAB = 50


def tiny_model(family, attention):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = Qwen3Config(**sizes, head_dim=8) if family == "qwen3" else LlamaConfig(**sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def random_sequences(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(1, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    return [TokenSequence(draw(n), min(2, n - 1), f"s{i}") for i, n in enumerate(lengths)]


def logits_alone(model, sequence):
    with torch.no_grad():
        return model(torch.tensor([sequence.ids]), use_cache=False).logits[0]


def target_logits(model, batch):
    with torch.no_grad():
        logits = model(
            batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits
    return logits[batch.target_index[:, 0], batch.target_index[:, 1]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("pack_length", [None, 16, 64])
def test_logits_equal_those_of_each_sequence_alone(family, attention, pack_length):
    """Several rows (16), one row (64), rows with trailing padding, sequences of one token."""
    model = tiny_model(family, attention)
    sequences = random_sequences([7, 3, 12, 1, 5, 9, 2])
    batch = collate(sequences, pad_id=0, pack_length=pack_length)
    expected = torch.cat([logits_alone(model, s)[max(s.prompt_length, 1) - 1 : len(s.ids) - 1] for s in sequences])
    assert len(batch.input_ids) == {None: 7, 16: 3, 64: 1}[pack_length]
    torch.testing.assert_close(target_logits(model, batch), expected, rtol=0, atol=1e-5)


def test_padding_in_a_packed_row_is_never_seen():
    model = tiny_model("qwen3", "sdpa")
    sequences = random_sequences([5, 9, 3])
    one, two = (collate(sequences, pad_id=pad, pack_length=9) for pad in (0, 33))
    assert not torch.equal(one.input_ids, two.input_ids)
    assert torch.equal(target_logits(model, one), target_logits(model, two))


def test_gradients_of_packed_and_padded_batches_are_equal():
    model = tiny_model("llama", "sdpa")
    sequences = random_sequences([7, 3, 12, 5], seed=1)
    grads = []
    for pack_length in (None, 20):
        batch = collate(sequences, 0, pack_length)
        logits = model(
            batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits
        rows, columns = batch.target_index.unbind(1)
        loss = torch.nn.functional.cross_entropy(logits[rows, columns], batch.target_ids, reduction="sum")
        model.zero_grad()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-5)


def test_check_packing_accepts_a_model_that_isolates_sequences():
    model = tiny_model("qwen3", "sdpa")
    check_packing(lambda ids, positions: model(ids, position_ids=positions, use_cache=False).logits, VOCAB, "cpu")


def test_check_packing_refuses_a_model_that_does_not():
    model = tiny_model("qwen3", "sdpa")
    everything = torch.ones(2, 12, dtype=torch.int64)  # a mask switches transformers' detection off
    with pytest.raises(PackingLeak, match="sdpa"):
        check_packing(
            lambda ids, positions: (
                model(ids, position_ids=positions, attention_mask=everything, use_cache=False).logits
            ),
            VOCAB,
            "cpu",
        )


def test_check_packing_refuses_nan():
    with pytest.raises(PackingLeak):
        check_packing(lambda ids, positions: torch.full((2, 12, VOCAB), torch.nan), VOCAB, "cpu")


def test_first_fit_decreasing_places_everything_once_and_within_capacity():
    lengths = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    rows = first_fit_decreasing(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 64
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + 1
    assert rows == first_fit_decreasing(list(lengths), 64)


def test_first_fit_decreasing_by_hand():
    assert first_fit_decreasing([3, 5, 5, 2, 4], 8) == [[1, 0], [2, 3], [4]]
    assert first_fit_decreasing([], 8) == []
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens"):
        first_fit_decreasing([2, 9], 8)
