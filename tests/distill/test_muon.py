"""Muon: its update is the orthogonal factor of the momentum, its AdamW half is torch's."""

from __future__ import annotations

import pytest
import torch

from distill.muon import Muon, orthogonalise

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("shape", [(8, 8), (24, 6), (5, 40)])
def test_orthogonalised_matrix_has_the_singular_vectors_and_flat_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = orthogonalise(matrix).double()
    inner = u.T @ found @ v.T
    diagonal = inner.diagonal()
    assert ((diagonal > 0.6) & (diagonal < 1.25)).all()
    assert (inner - torch.diag(diagonal)).abs().max() < 1e-4
    assert values.max() / values.min() > diagonal.max() / diagonal.min()


def test_vectors_and_embeddings_follow_torch_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.nn.Parameter(torch.randn(6)), torch.nn.Parameter(torch.zeros(6))
    theirs.data.copy_(ours.data)
    first = Muon([{"params": [ours], "weight_decay": 0.1, "matrix": False}], 0.02, (0.9, 0.95), 1e-8)
    second = torch.optim.AdamW([theirs], 0.02, (0.9, 0.95), 1e-8, 0.1)
    for step in range(5):
        gradient = torch.randn(6, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_muon_needs_fewer_steps_than_adamw_on_an_ill_conditioned_matrix() -> None:
    """A linear map with singular values over three decades: the reason to have Muon at all."""
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 16)
    target = inputs @ torch.randn(16, 16, generator=torch.Generator().manual_seed(1))

    def loss_after(matrix: bool) -> float:
        weight = torch.nn.Parameter(torch.zeros(16, 16))
        optimizer = Muon([{"params": [weight], "matrix": matrix}], 0.01, (0.9, 0.95), 1e-8)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (inputs @ weight - target).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss)

    assert loss_after(True) < loss_after(False)
