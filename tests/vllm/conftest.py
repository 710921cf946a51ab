"""One pair of real vLLM servers for all tests here; without an environment for them, every test is skipped."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import RankPool

PYTHON = os.environ.get("DISTILL_VLLM_PYTHON")
CONTEXT = 127
# Little memory, no compilation; the CPU backend wants blocks of a multiple of 32 tokens.
ARGUMENTS = ["--enforce-eager", "--block-size=32", "--kv-cache-memory-bytes=67108864", "--max-num-seqs=16"]
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

TINY = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the least that vLLM's CPU attention knows
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if PYTHON is None:
        skip = pytest.mark.skip(reason="needs vLLM in its own environment: run make vllm-test")
        for item in items:
            if "vllm" in item.keywords:
                item.add_marker(skip)


@dataclass(frozen=True)
class Pair:
    """Folders of two models, and the processes that serve them."""

    folders: dict[str, Path]
    servers: dict[str, Any]

    def overrides(self) -> list[str]:
        """Of a small run of these models."""
        return [
            "model=hf",
            f"model.student.path={self.folders['student']}",
            f"model.teacher.path={self.folders['teacher']}",
            "model.teacher_dtype=float32",
            "data.min_terms=2",
            "data.max_terms=6",
            f"train.max_length={CONTEXT}",
            "comm.backend=gloo",
        ]

    def engine(self, name: str) -> list[str]:
        """Overrides that choose who writes; vLLM: these servers."""
        urls = [f"rollout.vllm.{who}.url={server.address}" for who, server in self.servers.items()]
        return [f"rollout={name}", *(urls if name == "vllm" else [])]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student, and a teacher that mostly agrees with it: its weights, shaken."""
    import torch

    from distill.data import char_tokenizer
    from distill.models import build_model

    tokenizer, root = char_tokenizer("0123456789+-=\n#"), tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    model = build_model(TINY, tokenizer, "sdpa")
    found = {}
    for who in ("student", "teacher"):
        found[who] = root / who
        model.save_pretrained(str(found[who]))
        tokenizer.save_pretrained(str(found[who]))
        with torch.no_grad():
            for weights in model.parameters():
                weights.add_(torch.randn_like(weights) * 0.06)
    return found


@pytest.fixture(scope="session")
def pair(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    from distill.rollouts.vllm.processes import OwnServer, command

    assert PYTHON is not None
    logs = tmp_path_factory.mktemp("logs")
    servers = {}
    try:
        for who, folder in folders.items():
            words = command(PYTHON, folder, who, dtype="float32", context=CONTEXT + 1, top_k=20, arguments=ARGUMENTS)
            servers[who] = OwnServer(who, words, ENVIRONMENT, logs / f"{who}.log", updatable=True)
        deadline = time.monotonic() + 500
        for server in servers.values():
            server.wait(deadline)
        yield Pair(folders, servers)
    finally:
        for server in servers.values():
            server.stop()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool
