"""The ``ncclx`` command, and a script under torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import ncclx_py
from ncclx_py.cli import main

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.unit
def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["ncclx_py"] == ncclx_py.__version__
    assert facts["serves"]["cpu"] == {"by": "gloo", "why_not": None}
    assert (facts["serves"]["cuda"]["by"] == "nccl") == torch.cuda.is_available()
    assert facts["devices"][0]["device"] == "cpu"
    assert len(facts["devices"]) == 1 + torch.cuda.device_count()
    assert facts["launch"]["launcher"] == "none"


@pytest.mark.unit
def test_info_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x2)")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for words in (torch.__version__, "cpu tensors", "gloo", "slurm", "1 of 4", "n1, n2", "[2, 2]"):
        assert words in text


@pytest.mark.unit
def test_a_broken_environment_fails_with_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["info"]) == 1
    assert "ncclx info: error: RANK=2 with WORLD_SIZE=2" in capsys.readouterr().err


@pytest.mark.unit
@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["--version"]])
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert "ncclx" in capsys.readouterr().out


@pytest.mark.unit
@pytest.mark.parametrize("arguments", [[], ["nothing"], ["info", "--yaml"]])
def test_a_wrong_command_line(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


SCRIPT = """
    import json, os, subprocess, sys
    import torch, torch.distributed as dist
    import ncclx_py
    dist.init_process_group("ncclx")
    tensor = torch.ones(2) * (dist.get_rank() + 1)
    dist.all_reduce(tensor)
    facts = json.loads(subprocess.check_output([sys.executable, "-m", "ncclx_py", "info", "--json"]))
    with open(f"{sys.argv[1]}/{dist.get_rank()}", "w") as file:
        json.dump({"sum": tensor.tolist(), "backend": dist.get_backend(), "launch": facts["launch"]}, file)
    dist.destroy_process_group()
"""


@pytest.mark.dist
def test_a_script_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        facts = json.loads((tmp_path / str(rank)).read_text())
        assert facts["sum"] == [3.0, 3.0]
        assert facts["backend"] == "ncclx"
        launch = facts["launch"]
        assert (launch["launcher"], launch["rank"], launch["size"], launch["hosts"]) == ("torchrun", rank, 2, 1)
