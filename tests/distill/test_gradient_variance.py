"""The gradient-variance measurement: its sums against autograd over a whole batch, and its statistics against known ones."""

import pytest
import torch
from distill.kernels import token_nll

from distill.aggregation import tokens_per_sequence
from distill.assembly import assemble
from distill.bench.gradient_variance import AGGREGATIONS, GradientSampler, combine, main, measure, noise_and_signal
from distill.config import load_config
from distill.data.batch import collate
from distill.models import TargetLogits

pytestmark = pytest.mark.unit

TASK = [
    "data.min_terms=2",
    "data.max_terms=6",
    "train.batch_size=6",
    "train.max_length=48",
    "rollout.max_new_tokens=12",
]


def test_combined_gradients_are_those_of_the_loss_of_the_whole_batch():
    """Independent: one padded forward pass over the batch, the loss written out for each aggregation."""
    config = load_config("config", TASK)
    sampler = GradientSampler(config, assemble(config))
    gradients, lengths = sampler.batch(3)
    assert len(set(lengths)) > 1
    made = sampler.source.make(range(18, 24), None)
    batch = collate(made.sequences, sampler.pad, None)
    losses = token_nll(TargetLogits(sampler.student)(batch), batch.target_ids).loss
    per_sequence = torch.stack([losses[batch.sequence_index == i].sum() for i in range(6)])
    counts = torch.tensor(lengths, dtype=torch.float32)
    c = tokens_per_sequence(config)
    expected = {
        "token_mean": losses.mean(),
        "sequence_mean": (per_sequence / counts).mean(),
        "constant": per_sequence.sum() / (6 * c),
        "delta_l 0.75": (per_sequence * counts**-0.75).sum() / (counts**-0.75).sum() / c,
        "delta_l 1": (per_sequence / counts).sum() / (1 / counts).sum() / c,
    }
    for name, loss in expected.items():
        whole = torch.autograd.grad(loss, sampler.parameters, retain_graph=True)
        flat = torch.cat([g.flatten() for g in whole]).double()
        ours = combine(gradients, lengths, AGGREGATIONS[name], c)
        assert float((ours - flat).norm() / flat.norm()) < 1e-4, name


def test_noise_and_signal_of_known_estimates():
    """Many draws around a known mean: covariance trace 4·0.25, squared mean 9."""
    torch.manual_seed(0)
    draws = torch.tensor([3.0, 0.0, 0.0, 0.0]).double() + 0.5 * torch.randn(20_000, 4, dtype=torch.float64)
    noise, signal = noise_and_signal(draws)
    assert noise == pytest.approx(1.0, rel=0.03)
    assert signal == pytest.approx(9.0, rel=0.01)
    few = [noise_and_signal(chunk)[1] for chunk in draws.split(2)]  # two draws each: unbiased all the same
    assert sum(few) / len(few) == pytest.approx(9.0, rel=0.01)


def test_the_order_of_the_claim_shows_where_noise_grows_with_length():
    """g_i of length L_i has L_i times the variance around a mean shared by all: delta_l 1 is quietest."""
    torch.manual_seed(1)
    ratios = {}
    estimates = {name: [] for name in AGGREGATIONS}
    for _ in range(400):
        lengths = torch.randint(2, 60, (16,)).tolist()
        gradients = torch.ones(16, 8) + torch.tensor(lengths).sqrt().unsqueeze(1) * torch.randn(16, 8)
        for name, spec in AGGREGATIONS.items():
            estimates[name].append(combine(gradients, lengths, spec, 60.0))
    for name, values in estimates.items():
        noise, signal = noise_and_signal(torch.stack(values))
        ratios[name] = noise / signal
    assert ratios["delta_l 1"] < ratios["delta_l 0.75"] < ratios["constant"]


def test_a_whole_measurement_and_its_refusals(tmp_path, capsys):
    config = load_config("config", ["method=grpo", "method.group=2", *TASK])
    result = measure(config, 2)
    assert result["batch_size"] == 6
    assert set(result["aggregations"]) == set(AGGREGATIONS)
    assert main([*TASK, "--batches", "1"]) == 2
    assert "--batches 1" in capsys.readouterr().err
    assert main(["train.batch_sise=3"]) == 2
    assert "batch_sise" in capsys.readouterr().err
