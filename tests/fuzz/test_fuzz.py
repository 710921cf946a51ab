"""A short fuzz of every reader, as ``make fuzz`` runs it for long; and that the fuzzer would see a reader that misbehaves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

FUZZ = Path(__file__).with_name("fuzz.py")

BROKEN = """
import sys, time, pathlib
sys.path.insert(0, {folder!r})
import fuzz, targets, tempfile
outside = pathlib.Path(tempfile.mkdtemp())
def crash(data, folder): raise KeyError("x") if len(data) > 3 else ValueError("refused")
def silent(data, folder): raise ValueError
def hang(data, folder):
    while True: time.sleep(0.01)
def astray(data, folder): (outside / "file").write_bytes(data)
def eats(data, folder): [0] * 10**10
def fine(data, folder): (folder / "file").write_bytes(data); raise ValueError("refused")
fuzz.SECONDS, fuzz.SHOWN = 0.2, 1
targets.all_targets = fuzz.all_targets = lambda: []
fuzz.prepare()
for read in (crash, silent, hang, astray, eats, fine):
    _, failures = fuzz.run_target(targets.Target(read.__name__, 1, [b'{{"a": 1}}'], read, (ValueError,)), 1, 5, print)
    print(read.__name__, "|", failures[0].story if failures else "nothing")
"""


def test_no_reader_hangs_crashes_or_writes_elsewhere() -> None:
    done = subprocess.run([sys.executable, str(FUZZ), "--cases", "500"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    total = re.search(r"^(\d+) cases in \d+ s, 0 failures", done.stdout, re.MULTILINE)
    assert total is not None
    assert int(total[1]) >= 500


def test_the_fuzzer_sees_every_kind_of_misbehaviour() -> None:
    script = BROKEN.format(folder=str(FUZZ.parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" | ") for line in done.stdout.splitlines() if " | " in line)
    assert found["crash"].startswith("KeyError")
    assert found["silent"] == "ValueError without a message"
    assert found["hang"].startswith("not done after 0.2 s")
    assert "outside of its folder: open" in found["astray"]
    assert found["eats"].startswith("MemoryError")
    assert found["fine"] == "nothing"
