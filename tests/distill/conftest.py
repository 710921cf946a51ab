"""Tiny models on disk and pools of ranks, shared by the trainer's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import RankPool

TINY = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,  # far from uniform, so that a KL between two of them is worth measuring
}


def save_tiny(folder: Path, seed: int, **changes: Any) -> Path:
    """A random Qwen3-architecture model with the running-sum alphabet, as a Hugging Face folder."""
    import torch

    from distill.data import char_tokenizer
    from distill.models import build_model

    tokenizer = char_tokenizer("0123456789+-=\n#")
    torch.manual_seed(seed)
    model = build_model({**TINY, **changes}, tokenizer, "sdpa")
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """``make_model(folder, seed, **changes)``: see `save_tiny`."""
    return save_tiny


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``student``, ``teacher``, and ``wide``: a teacher whose vocabulary is padded by 7 rows."""
    root = tmp_path_factory.mktemp("models")
    return {
        "student": save_tiny(root / "student", 1),
        "teacher": save_tiny(root / "teacher", 2, hidden_size=24),
        "wide": save_tiny(root / "wide", 2, hidden_size=24, vocab_size=24),
    }


@pytest.fixture(scope="session")
def base_overrides(tiny_models: dict[str, Path]) -> list[str]:
    """A small distillation run; sequences differ in length, so that a wrong normalisation cannot hide."""
    return [
        "model=hf",
        f"model.student.path={tiny_models['student']}",
        f"model.teacher.path={tiny_models['teacher']}",
        "model.teacher_dtype=float32",
        "data.min_terms=2",
        "data.max_terms=6",
        "train.steps=4",
        "train.batch_size=16",
        "train.micro_batch_size=8",
        "train.max_length=64",
        "rollout.max_new_tokens=20",
        "engine.lr=0.003",
        "run.tensorboard=false",
    ]


# What a training run imports, the parts that it imports late too.
TRAINER = ("distill.train", "distill.trainer", "transformers.models.qwen3.modeling_qwen3", "matplotlib.figure")


def trainers(size: int) -> RankPool:
    """A pool of ranks that have imported the trainer."""
    return RankPool(size, preload=TRAINER)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    with trainers(1) as pool:
        yield pool


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    with trainers(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def make_trainers() -> Callable[[int], RankPool]:
    """``make_trainers(size)``: ranks of a test's own, to be used in a ``with`` block."""
    return trainers
