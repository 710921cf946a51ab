"""Micro-batches: layout, targets, edge cases, against a loop that writes out the definition."""

import pytest
import torch

from distill.data import TokenSequence, collate

pytestmark = pytest.mark.unit


def sequences_of(*shapes):
    """(length, prompt_length) pairs; tokens are unique over the batch, so a misplaced one shows."""
    tokens = iter(range(100, 1000))
    return [TokenSequence([next(tokens) for _ in range(n)], p, f"e{i}") for i, (n, p) in enumerate(shapes)]


@pytest.mark.parametrize("pack_length", [None, 9, 100])
def test_targets_by_definition(pack_length):
    sequences = sequences_of((6, 2), (3, 1), (9, 4), (4, 4), (2, 0), (1, 0), (5, 4))
    batch = collate(sequences, 7, pack_length)
    expected = [
        (i, s.ids[k], s.ids[k - 1], k - 1)
        for i, s in enumerate(sequences)
        for k in range(max(s.prompt_length, 1), len(s.ids))
    ]
    rows, columns = batch.target_index.unbind(1)
    found = zip(
        batch.sequence_index.tolist(),
        batch.target_ids.tolist(),
        batch.input_ids[rows, columns].tolist(),
        batch.position_ids[rows, columns].tolist(),
    )
    assert list(found) == expected
    assert batch.example_ids == [s.example_id for s in sequences]
    assert batch.target_index.dtype == batch.target_ids.dtype == batch.input_ids.dtype == torch.int64


@pytest.mark.parametrize("pack_length", [None, 9])
def test_masked_tokens_are_no_targets(pack_length):
    """Every mask of a few short sequences, the empty one and one without a prompt included."""
    masks = [[i >> bit & 1 == 1 for bit in range(3)] for i in range(8)]
    sequences = [
        TokenSequence([10 * i + k for k in range(prompt + 3)], prompt, f"e{i}-{prompt}", mask, [-1.0, -2.0, -3.0])
        for i, mask in enumerate(masks)
        for prompt in (0, 1, 2)
    ]
    batch = collate(sequences, 7, pack_length)
    expected = [
        (i, s.ids[k], -1.0 - (k - s.prompt_length))
        for i, s in enumerate(sequences)
        for k in range(max(s.prompt_length, 1), len(s.ids))
        if s.supervised[k - s.prompt_length]
    ]
    found = zip(batch.sequence_index.tolist(), batch.target_ids.tolist(), batch.behaviour_logprobs.tolist())
    assert list(found) == expected
    rows, columns = batch.target_index.unbind(1)
    assert batch.input_ids[rows, columns + 1].tolist() == batch.target_ids.tolist()


def test_text_that_no_model_wrote_has_no_behaviour_logprobs():
    sequences = [*sequences_of((3, 1)), TokenSequence([1, 2], 1, "x", None, [-0.5])]
    logprobs = collate(sequences, 7, None).behaviour_logprobs
    assert logprobs[:2].isnan().all()
    assert logprobs[2:].tolist() == [-0.5]
    assert logprobs.dtype == torch.float32


def test_padded_layout():
    batch = collate(sequences_of((3, 1), (1, 0)), 7, None)
    assert batch.input_ids.tolist() == [[100, 101, 102], [103, 7, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_packed_layout():
    batch = collate(sequences_of((2, 1), (4, 1), (3, 1)), 7, 6)
    assert batch.attention_mask is None
    assert batch.input_ids.tolist() == [[102, 103, 104, 105, 100, 101], [106, 107, 108, 7, 7, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]]


@pytest.mark.parametrize("pack_length", [None, 8])
def test_a_rank_without_samples_still_has_something_to_run(pack_length):
    batch = collate([], 7, pack_length)
    assert batch.input_ids.tolist() == [[7]]
    assert (batch.target_index.shape, batch.target_ids.shape, batch.sequence_index.shape) == ((0, 2), (0,), (0,))


def test_bad_sequences_are_named():
    with pytest.raises(ValueError, match="e0 has no tokens"):
        collate(sequences_of((0, 0)), 7, None)
    with pytest.raises(ValueError, match="e1 has 9 tokens and does not fit into rows of 8"):
        collate(sequences_of((3, 1), (9, 1)), 7, 8)


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = collate(sequences_of((3, 1), (2, 1)), 7, None).to("meta")
    tensors = [getattr(batch, name) for name in batch.__slots__ if isinstance(getattr(batch, name), torch.Tensor)]
    assert len(tensors) == 7
    assert all(t.device.type == "meta" for t in tensors)
    assert collate(sequences_of((3, 1)), 7, 8).to("meta").attention_mask is None
