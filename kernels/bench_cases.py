"""What `bench` measures: every provider of a divergence, as a function of no arguments that does one step.

`full` is loss and gradient, `forward` the loss alone (under no_grad). Peers are measured where they are installed and are
given their best case: Liger's kernels take log-probabilities, so its rows include the log-softmaxes that a trainer needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense import divergence
from .linear import GRADIENTS, linear_divergence

Step = Callable[[], object]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LOGIT_PROVIDERS = ("triton", "torch", "eager", "compile", "liger")
LINEAR_PROVIDERS = (*GRADIENTS, "eager", "liger", "liger-chunked", "gemms")


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table. `hidden` = 0: from logits, else from hidden states of that size and heads."""

    provider: str
    kind: str
    mode: str
    dtype: str
    tokens: int
    vocab: int
    hidden: int = 0
    device: str = "cuda"
    stats: bool = False

    def bytes_per_element(self) -> int:
        """Least traffic per (token, id): two logits read once per sweep, the gradient written once."""
        size = DTYPES[self.dtype].itemsize
        sweeps = 1 if self.kind in ("forward_kl", "reverse_kl") else 2
        return 2 * size * sweeps + (3 * size if self.mode == "full" else 0)


def available(provider: str, device: str) -> bool:
    """Whether a provider can run here at all."""
    if provider.startswith("liger"):
        return device == "cuda" and find_spec("liger_kernel") is not None
    return device == "cuda" or provider not in ("triton", "compile")


def build(case: Case) -> Step:
    """The step of a case, inputs allocated. Fused-linear steps add to gradients that exist; those from logits make theirs.

    Raises:
        ValueError: for a provider that does not know the case's kind.
    """
    return _linear_step(case) if case.hidden else _logit_step(case)


def _logit_step(case: Case) -> Step:
    g = torch.Generator(case.device).manual_seed(0)
    shape = (case.tokens, case.vocab)
    student, teacher = (
        torch.randn(shape, generator=g, device=case.device, dtype=torch.float32 if case.device == "cpu" else None)
        .mul_(3)
        .to(DTYPES[case.dtype])
        for _ in range(2)
    )
    loss = _logit_loss(case)
    if case.mode == "forward":
        return lambda: _without_grad(loss, student, teacher)
    student.requires_grad_()

    def step() -> None:
        student.grad = None
        loss(student, teacher).backward()

    return step


def _logit_loss(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """(student, teacher) → scalar."""
    if case.provider in ("triton", "torch"):
        return lambda s, t: divergence(s, t, case.kind, path=case.provider, stats=case.stats).loss.mean()
    if case.provider == "liger":
        return _liger_from_logits(case.kind)
    if case.provider == "compile":
        torch.compiler.reset()  # or the sweep's second shape gets a slower, dynamic graph, and the ninth runs uncompiled
        return torch.compile(eager_loss(case.kind), dynamic=False)
    return eager_loss(case.kind)


def eager_loss(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Plain PyTorch as a trainer writes it, in fp32."""

    def loss(s: Tensor, t: Tensor) -> Tensor:
        logq, logp = s.float().log_softmax(-1), t.float().log_softmax(-1)
        if kind == "forward_kl":
            return F.kl_div(logq, logp, reduction="none", log_target=True).sum(-1).mean()
        if kind == "reverse_kl":
            return F.kl_div(logp, logq, reduction="none", log_target=True).sum(-1).mean()
        logm = torch.logaddexp(logq, logp) - 0.6931471805599453
        forward = F.kl_div(logm, logp, reduction="none", log_target=True).sum(-1)
        return (0.5 * (forward + F.kl_div(logm, logq, reduction="none", log_target=True).sum(-1))).mean()

    if kind not in ("forward_kl", "reverse_kl", "jsd"):
        raise ValueError(f"the eager reference knows forward_kl, reverse_kl and jsd, not {kind!r}")
    return loss


def _liger_from_logits(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    if kind == "forward_kl":
        kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)
        return lambda s, t: kl(s.float().log_softmax(-1), t.float().log_softmax(-1))
    jsd = LigerJSD(beta={"jsd": 0.5, "reverse_kl": 1.0}[kind])
    return lambda s, t: jsd(s.float().log_softmax(-1), t.float().log_softmax(-1))


def _linear_step(case: Case) -> Step:
    device, dtype = case.device, DTYPES[case.dtype]
    torch.manual_seed(0)
    hidden, other = (torch.randn(case.tokens, case.hidden, device=device, dtype=dtype) for _ in range(2))
    scale = 3 / case.hidden**0.5
    head, teacher = (torch.randn(case.vocab, case.hidden, device=device, dtype=dtype).mul_(scale) for _ in range(2))
    if case.provider == "gemms":
        return lambda: _products(hidden, head, other, teacher)
    loss = _linear_loss(case)
    if case.mode == "forward":
        return lambda: _without_grad(loss, hidden, head, other, teacher)
    hidden.requires_grad_()
    head.requires_grad_()
    hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)
    return lambda: loss(hidden, head, other, teacher).backward()


def _linear_loss(case: Case) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    if case.provider in GRADIENTS:
        return lambda h, w, o, t: linear_divergence(
            h, w, o, t, case.kind, stats=case.stats, gradient=case.provider
        ).loss.mean()  # fmt: skip
    if case.provider == "eager":
        eager = eager_loss(case.kind)
        return lambda h, w, o, t: eager(h @ w.t(), o @ t.t())
    beta = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}[case.kind]
    if case.provider == "liger":
        from liger_kernel.transformers import LigerFusedLinearJSD

        fused = LigerFusedLinearJSD(jsd_beta=beta)
        return lambda h, w, o, t: fused(h, w, o, t, None)
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    labels = torch.zeros(case.tokens, dtype=torch.long, device=case.device)
    return lambda h, w, o, t: chunked(h, w, o, t, labels, None, None)


def _products(hidden: Tensor, head: Tensor, other: Tensor, teacher: Tensor, rows: int = 2048) -> None:
    """The student's three matrix products (logits, ∂hidden, ∂head) and nothing else: the floor of the fused loss."""
    total = torch.zeros_like(head)
    for part in hidden.split(rows):
        logits = part @ head.t()
        logits @ head
        total.addmm_(logits.t(), part)


def _without_grad(function: Callable[..., object], *arguments: Tensor) -> None:
    with torch.no_grad():
        function(*arguments)
