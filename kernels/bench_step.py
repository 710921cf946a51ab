"""A whole distillation step with models of real shape: tokens/s, share of peak FLOPs, peak memory, per way to the loss.

    python -m distill.kernels.bench_step                       # Qwen3-4B teacher, Qwen3-0.6B student, 8 × 4096 tokens, bf16
    python -m distill.kernels.bench_step --tiny --device cpu   # the same code in seconds, to see that it runs

Weights and tokens are random: time and memory do not depend on them. A step is the teacher's forward pass, the student's
forward and backward passes (activation checkpointing), and AdamW. The losses differ in one thing only, how they get from
hidden states to a gradient: "forward" and "recompute" are `linear_divergence`, "logits" is `divergence` on full logits,
"eager" is PyTorch's kl_div on full logits, "liger" is Liger's fused-linear JSD.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bench import RESULTS, facts, slug
from .bench_cases import available, eager_loss
from .bench_memory import peak_above
from .dense import divergence
from .linear import linear_divergence

LOSSES = ("forward", "recompute", "logits", "eager", "liger")
_SHAPES = {
    "Qwen3-0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "Qwen3-4B": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}


def make_model(name: str, device: str, vocab: int) -> Any:
    """A Qwen3 causal language model with random bf16 weights, head tied to the embedding."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = (
        {"num_key_value_heads": 2, "head_dim": 16} if name == "tiny" else {"num_key_value_heads": 8, "head_dim": 128}
    )
    shape: dict[str, Any] = _SHAPES[name] | heads
    with torch.device(device):
        model: nn.Module = Qwen3ForCausalLM(Qwen3Config(**shape, vocab_size=vocab, tie_word_embeddings=True))
    return model.to(torch.bfloat16)


def make_loss(name: str, kind: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(student hidden, student head, teacher hidden, teacher head) → mean loss over tokens."""
    if name in ("forward", "recompute"):
        return lambda h, w, o, t: linear_divergence(h, w, o, t, kind, gradient=name).loss.mean()
    if name == "logits":
        return lambda h, w, o, t: divergence(h @ w.t(), o @ t.t(), kind, inplace=True).loss.mean()
    if name == "eager":
        eager = eager_loss(kind)
        return lambda h, w, o, t: eager(h @ w.t(), o @ t.t())
    from liger_kernel.transformers import LigerFusedLinearJSD

    fused = LigerFusedLinearJSD(jsd_beta={"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}[kind])
    return lambda h, w, o, t: fused(h, w, o, t, None)


def make_step(name: str, kind: str, student: Any, teacher: Any, tokens: Tensor) -> Callable[[], None]:
    """One optimiser step; AdamW's state exists after the first."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=tokens.is_cuda)
    loss = make_loss(name, kind)

    def step() -> None:
        with torch.no_grad():
            other = teacher.model(tokens).last_hidden_state.flatten(0, 1)
        hidden = student.model(tokens).last_hidden_state.flatten(0, 1)
        loss(hidden, student.lm_head.weight, other, teacher.lm_head.weight).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def flops(student: Any, teacher: Any, batch: int, length: int) -> float:
    """Model FLOPs of a step: 6·parameters·tokens for the student, 2· for the teacher, plus causal attention."""

    def forward(model: Any) -> float:
        c = model.config
        attention = 2 * length * c.num_hidden_layers * c.num_attention_heads * c.head_dim  # 2 products, half masked
        return batch * length * (2.0 * _matrix_parameters(model) + attention)

    return 3 * forward(student) + forward(teacher)


def main(argv: list[str]) -> None:
    """Measures every loss; one CSV row each."""
    options = _parse(argv)
    torch.manual_seed(0)
    vocab = 512 if options.tiny else 151936
    names = ("tiny", "tiny") if options.tiny else ("Qwen3-0.6B", "Qwen3-4B")
    out = options.out or RESULTS / f"step-{slug(facts(options.device)['device_name'])}.csv"
    for loss in options.losses:
        if not available(loss, options.device):
            print(f"{loss:10} not installed, or not for {options.device}")
            continue
        row = _measure(loss, options, names, vocab)
        _append(out, row | facts(options.device))
        print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(f"rows appended to {out}")


def _measure(loss: str, options: argparse.Namespace, names: tuple[str, str], vocab: int) -> dict[str, object]:
    student, teacher = (make_model(name, options.device, vocab) for name in names)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    teacher.eval().requires_grad_(False)
    tokens = torch.randint(vocab, (options.batch, options.length), device=options.device)
    row: dict[str, object] = {"loss": loss, "kind": options.kind, "student": names[0], "teacher": names[1]}
    row |= {"batch": options.batch, "length": options.length}
    step = make_step(loss, options.kind, student, teacher, tokens)
    try:
        step()
        peak = peak_above(step, options.device)
        seconds = _median_seconds(step, options.device, options.repeats)
    except torch.cuda.OutOfMemoryError:
        return row | {"error": "out of memory"}
    rate = flops(student, teacher, options.batch, options.length) / seconds
    return row | {
        "seconds": f"{seconds:.5g}",
        "tokens_per_s": f"{tokens.numel() / seconds:.5g}",
        "tflops": f"{rate / 1e12:.4g}",
        "share_of_peak": f"{rate / 1e12 / options.peak_tflops:.3f}",
        "peak_bytes_above_state": peak,
    }


def _median_seconds(step: Callable[[], None], device: str, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def _matrix_parameters(model: nn.Module) -> int:
    """Elements of the matrices that multiply every token; the tied embedding counts once, as the head."""
    return sum(p.numel() for p in model.parameters() if p.dim() == 2)


def _append(path: Path, row: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = [
        "loss",
        "kind",
        "student",
        "teacher",
        "batch",
        "length",
        "seconds",
        "tokens_per_s",
        "tflops",
        "share_of_peak",
    ]
    fields += ["peak_bytes_above_state", "error", *facts("cpu")]
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m distill.kernels.bench_step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--kind", choices=("forward_kl", "reverse_kl", "jsd"), default="jsd")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096, help="tokens per row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="dense bf16 peak of the device (H100, H200: 989)"
    )
    parser.add_argument("--tiny", action="store_true", help="two tiny models")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
