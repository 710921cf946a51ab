"""Vocabulary-parallel divergences over three processes with uneven shards, against the whole vocabulary."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distill.kernels import divergence, vocab_parallel_divergence

from .kernel_cases import IDS, KINDS, logits

pytestmark = pytest.mark.dist
WORKER = Path(__file__).with_name("vocab_parallel_worker.py")
V, RANKS = 101, 3
BOUNDS = (0, 40, 41, V)


def make_cases() -> list[dict]:
    cases = []
    for regime in ("far", "close", "ties"):
        for kind, kw in KINDS:
            student, teacher = (x.view(2, 3, V) for x in logits(regime, 6, V))
            ids = torch.tensor([[0, 39, 40], [41, 100, -1]])
            weights = torch.tensor([[1.0, 0.5, 2.0], [0.0, 1.0, 1.0]])
            options = {"kind": kind, "temperature": 1.3, "token_ids": ids, "weights": weights, **kw}
            if regime == "far":
                options |= {"student_softcap": 5.0, "teacher_softcap": 4.0, "teacher_scale": 0.9}
            upstream = torch.linspace(0.5, 2, 6).view(2, 3)
            cases.append(
                {"student": student, "teacher": teacher, "options": options, "upstream": upstream, "bounds": BOUNDS}
            )
    return cases


def run_ranks(cases: list[dict], folder: Path, **environment: str) -> list[list]:
    """Results of every case on every rank."""
    torch.save(cases, folder / "out.cases")
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                str(WORKER),
                str(rank),
                str(RANKS),
                str(folder / "store"),
                str(folder / "out"),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        for rank in range(RANKS)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * RANKS, "\n".join(errors)[-4000:]
    return [torch.load(folder / f"out.{rank}") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cases = make_cases()
    return cases, run_ranks(cases, tmp_path_factory.mktemp("vocab"))


@pytest.mark.parametrize(
    "index", range(3 * len(KINDS)), ids=[f"{r}-{i}" for r in ("far", "close", "ties") for i in IDS]
)
def test_equals_the_whole_vocabulary_and_all_ranks_agree_to_the_bit(results, index):
    cases, ranks = results
    check(cases[index], [r[index] for r in ranks])


def test_triton_kernels_interpreted(tmp_path):
    cases = make_cases()[: len(KINDS)]
    for case in cases:
        case["options"]["path"] = "triton"
    ranks = run_ranks(cases, tmp_path, TRITON_INTERPRET="1")
    for index, case in enumerate(cases):
        case["options"]["path"] = "torch"
        check(case, [r[index] for r in ranks])


def check(case: dict, ranks: list[tuple]) -> None:
    whole = case["student"].clone().requires_grad_()
    out = divergence(whole, case["teacher"], stats=True, top_k=0, **case["options"])
    (out.loss * case["upstream"]).sum().backward()
    loss, _, stats = ranks[0]
    torch.testing.assert_close(loss, out.loss.detach(), rtol=2e-5, atol=3e-7)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks], -1), whole.grad, rtol=1e-3, atol=1e-7)
    assert set(stats) == set(out.stats)
    for name, values in out.stats.items():
        torch.testing.assert_close(stats[name], values, rtol=2e-5, atol=2e-6, msg=name)
        assert all(torch.equal(r[2][name], stats[name]) for r in ranks)
    assert all(torch.equal(r[0], loss) for r in ranks)


def test_errors_come_before_any_communication():
    with pytest.raises(ValueError, match="3 columns, teacher 4"):
        vocab_parallel_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="vocab_start"):
        vocab_parallel_divergence(torch.zeros(2, 3), torch.zeros(2, 3), token_ids=torch.zeros(2, dtype=torch.long))
