"""Muon for matrices, AdamW for the rest, in one optimizer.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") replaces the momentum of a weight matrix by the
nearest semi-orthogonal matrix, found by five Newton–Schulz iterations. Small models leave their plateaus several times sooner than
with AdamW. ``torch.optim.Muon`` iterates in bf16, which CPUs emulate slowly, and takes matrices only; this one works in fp32 on CPU
(bf16 on CUDA) and handles embeddings, norms and biases by AdamW in the same ``step``.

It needs whole matrices, so it runs under ZeRO-0 only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # quintic coefficients: steep at 0, all singular values end in about [0.7, 1.2]


class Muon(torch.optim.Optimizer):
    """Parameter groups with ``matrix=True`` get Muon at ``lr·muon_ratio``, the others AdamW at ``lr``."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        muon_ratio: float = 10.0,
        momentum: float = 0.95,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": 0.0,
            "matrix": False,
            "muon_ratio": muon_ratio,
        }
        super().__init__(params, defaults | {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            update = self._muon if group["matrix"] else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, parameter.grad, group)

    def _muon(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
        ahead = grad.lerp(momentum, group["momentum"])  # Nesterov
        lr = group["lr"] * group["muon_ratio"]
        rows, columns = parameter.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalise(ahead), alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def _adamw(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        fast, slow = group["betas"]
        mean = state["mean"].lerp_(grad, 1 - fast)
        square = state["square"].lerp_(grad.square(), 1 - slow)
        scale = (square / (1 - slow ** state["step"])).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean, scale, value=-group["lr"] / (1 - fast ** state["step"]))


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """About the nearest semi-orthogonal matrix of ``[R, C]``, in its dtype (Newton–Schulz after Frobenius normalisation)."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)
