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

_spec = importlib.util.spec_from_file_location("harness", Path(__file__).with_name("harness.py"))
assert _spec is not None
assert _spec.loader is not None
sys.modules["harness"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["harness"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        # A file's tests share ranks that were started once. Those that build networks or clusters look for what is left over on
        # the machine, and load it: one after another.
        for item in items:
            alone = {"net", "slurm"} & {marker.name for marker in item.iter_markers()}
            item.add_marker(pytest.mark.xdist_group("network" if alone else str(item.path)))
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            skip = pytest.mark.skip(reason="needs a CUDA device")
            for item in items:
                if "gpu" in item.keywords:
                    item.add_marker(skip)
