"""The benchmarks on CPU, tiny: providers compute the same loss, every row has its columns, and running out of memory is a row."""

import csv

import pytest
import torch
from distill.kernels import bench, bench_step
from distill.kernels.bench_cases import Case, _linear_loss, _logit_loss

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("kind", bench.KINDS)
def test_providers_compute_the_same_loss_and_gradient(kind):
    torch.manual_seed(0)
    hidden, other, head, teacher = (torch.randn(*shape) for shape in ((6, 8), (6, 8), (40, 8), (40, 8)))
    found = []
    for provider in ("torch", "eager"):
        x = (hidden @ head.t()).requires_grad_()
        loss = _logit_loss(Case(provider, kind, "full", "fp32", 6, 40, 0, "cpu"))(x, other @ teacher.t())
        found.append((loss, *torch.autograd.grad(loss, x)))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)
    for provider in ("recompute", "forward", "eager"):
        loss = _linear_loss(Case(provider, kind, "full", "fp32", 6, 40, 8, "cpu"))(hidden, head, other, teacher)
        torch.testing.assert_close(loss, found[0][0].detach(), rtol=1e-4, atol=1e-7)


def test_rows_say_what_was_measured_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_isolated", lambda case, arguments: bench.measure(case, arguments.repeats, 1))
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 10.0)
    out = tmp_path / "rows.csv"
    size = ["--tokens", "4", "--vocab", "30", "--hidden", "8", "--kinds", "jsd", "--dtypes", "fp32"]
    bench.main(bench._parse(["--device", "cpu", *size, "--repeats", "1", "--threads", "1", "--out", str(out)]))
    rows = list(csv.DictReader(out.open()))
    assert [row["provider"] for row in rows] == ["torch"] * 2 + ["eager"] * 2 + [
        "recompute",
        "forward",
        "eager",
        "gemms",
    ]
    for row in rows:
        assert float(row["seconds"]) > 0
        assert not row["error"]
        assert all(row[name] for name in ("device_name", "threads", "torch", "time", "command", "copy_gb_per_s"))


def test_running_out_of_device_memory_is_a_row(monkeypatch):
    def full(case: Case) -> None:
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(bench, "_load_libraries", lambda: None)
    monkeypatch.setattr(bench, "build", full)
    assert bench.measure(Case("torch", "jsd", "full", "fp32", 8, 64, 0, "cpu"), 1, 1)["error"] == "out of memory"


def test_a_whole_step_of_tiny_models(tmp_path):
    out = tmp_path / "step.csv"
    bench_step.main(["--device", "cpu", "--tiny", "--batch", "1", "--length", "8", "--repeats", "1", "--out", str(out)])
    rows = list(csv.DictReader(out.open()))
    assert [row["loss"] for row in rows] == ["forward", "recompute", "logits", "eager"]
    assert all(float(row["tokens_per_s"]) > 0 and int(row["peak_bytes_above_state"]) >= 0 for row in rows)
