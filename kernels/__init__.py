"""Divergences between a student's and a teacher's next-token distributions: loss, gradient and monitoring in one go.

    from distill.kernels import divergence, linear_divergence, token_nll

    out = divergence(student_logits, teacher_logits, kind="reverse_kl", weights=mask, stats=True)
    (out.loss.sum() / mask.sum()).backward()

Every function returns the *unreduced* loss of each token (fp32, log base e) and, on request, per-token statistics;
masks and normalisation over the global batch belong to the caller. Three paths share one definition: Triton kernels (CUDA), a
chunked torch path (CPU, and wherever Triton is missing) and an fp64 oracle (`distill.kernels.oracle`).

Names are imported on first use: importing this package needs neither torch nor triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dense import divergence as divergence
    from .kinds import KINDS as KINDS
    from .kinds import DivergenceOutput as DivergenceOutput
    from .linear import linear_divergence as linear_divergence
    from .linear_tokens import LinearLogits as LinearLogits
    from .oracle import divergence_oracle as divergence_oracle
    from .sparse import sampled_reverse_kl as sampled_reverse_kl
    from .sparse import sparse_divergence as sparse_divergence
    from .tokens import token_logprobs as token_logprobs
    from .tokens import token_nll as token_nll
    from .vocab_parallel import vocab_parallel_divergence as vocab_parallel_divergence

__version__ = "0.0.0"  # transformers reads it where this folder shadows the PyPI package `kernels`: must stay below 0.9

_HOME = {
    "DivergenceOutput": "kinds",
    "KINDS": "kinds",
    "LinearLogits": "linear_tokens",
    "divergence": "dense",
    "divergence_oracle": "oracle",
    "linear_divergence": "linear",
    "sampled_reverse_kl": "sparse",
    "sparse_divergence": "sparse",
    "token_logprobs": "tokens",
    "token_nll": "tokens",
    "vocab_parallel_divergence": "vocab_parallel",
}

__all__ = [
    "KINDS",
    "DivergenceOutput",
    "LinearLogits",
    "divergence",
    "divergence_oracle",
    "linear_divergence",
    "sampled_reverse_kl",
    "sparse_divergence",
    "token_logprobs",
    "token_nll",
    "vocab_parallel_divergence",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
