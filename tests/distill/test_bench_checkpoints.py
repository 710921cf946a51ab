"""A few kills while saving, and a disk that is full; the long run is ``python -m distill.bench.checkpoints``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.dist
def test_there_is_always_a_complete_checkpoint(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    words = [sys.executable, "-m", "distill.bench.checkpoints", "--kills", "3", "--json", str(record)]
    words += ["--full-disks", "3"] if os.geteuid() == 0 else []
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    assert (found["kills"], found["failures"]) == (3, [])
    assert found["full_disks"] == (3 if os.geteuid() == 0 else 0)
    assert found["saves"] >= 3
