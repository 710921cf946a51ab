"""Shared by all tests: import paths, and skips for what a machine lacks."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# ``python -m pytest`` puts the repository's root on the path, where the folders `kernels` and `launch` would shadow
# packages of the same name that transformers looks for. The project is installed: tests import what users import.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]

for _name in ("nursery", "harness"):
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])


# The groups that take longest, which begin first, so that all workers end at about the same time (--no-loadscope-reorder).
LONGEST = (
    "network", "test_resume.py", "test_compare.py", "test_replicas.py", "test_equal_loss.py", "test_bad_input.py", "test_triton.py",
    "test_rollout_command.py", "test_motab.py", "test_training.py", "test_bench_checkpoints.py", "test_fuzz.py", "test_torchrun.py",
    "test_failures.py", "test_parity.py",
)  # fmt: skip


def group_of(item: pytest.Item) -> str:
    """A file's tests share ranks that were started once. Those that build networks or clusters look for what is left over on the
    machine, and load it: one after another."""
    alone = {"net", "slurm"} & {marker.name for marker in item.iter_markers()}
    return "network" if alone else item.path.relative_to(ROOT / "tests").as_posix()


def turn_of(group: str) -> int:
    name = Path(group).name
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group_of(item)))
        items.sort(key=lambda item: turn_of(group_of(item)))
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            skip = pytest.mark.skip(reason="needs a CUDA device")
            for item in items:
                if "gpu" in item.keywords:
                    item.add_marker(skip)
