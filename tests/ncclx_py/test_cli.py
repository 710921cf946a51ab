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
CHOOSING = ("NCCLX_TOPOLOGY", "NCCLX_TABLE", "NCCLX_RULES", "NCCLX_ALGO", "NCCLX_DETERMINISTIC", "NCCLX_RAILS")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHER, *CHOOSING):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.unit
def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["ncclx_py"] == ncclx_py.__version__
    assert facts["serves"]["cpu"]["by"].startswith("plans")
    assert (facts["serves"]["cuda"]["by"] == "nccl") == torch.cuda.is_available()
    assert facts["devices"][0]["device"] == "cpu"
    assert len(facts["devices"]) == 1 + torch.cuda.device_count()
    assert facts["launch"]["launcher"] == "none"
    assert facts["topology"]["host_of"] == [0]
    assert facts["topology"]["sources"]["hosts"] == "one process"


@pytest.mark.unit
def test_info_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x2)")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for words in (torch.__version__, "cpu tensors", "shared memory", "slurm", "1 of 4", "n1, n2", "[2, 2]"):
        assert words in text
    for words in ("2 of 2 ranks (slurm)", "α 50 µs (default), 1.25 GB/s per NIC (default)"):
        assert words in text


TOPOLOGY = """
hosts = 2
ranks_per_host = [3, 2]
placement = "cyclic"
rails = 2
[inter]
alpha = "20us"
bandwidth = "200Mbit/s"
[[nic]]
host = 1
rail = 1
bandwidth = "100Mbit/s"
"""


@pytest.mark.unit
def test_info_shows_the_topology_and_where_it_comes_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(TOPOLOGY)
    monkeypatch.setenv("NCCLX_TOPOLOGY", str(file))
    assert main(["info", "--json"]) == 0
    topology = json.loads(capsys.readouterr().out)["topology"]
    assert (topology["hosts"], topology["ranks_per_host"], topology["rails"]) == (2, [3, 2], 2)
    assert topology["host_of"] == [0, 1, 0, 1, 0]
    assert topology["levels"]["inter"] == {"alpha_s": 2e-5, "bandwidth_Bps": 25e6}
    assert topology["nics_Bps"] == [[25e6, 25e6], [25e6, 12.5e6]]
    assert topology["sources"]["inter.alpha"] == f"file {file}"
    assert topology["sources"]["intra.alpha"] == "default"
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for words in ("2 of 3+2 ranks", "host 1: 25 MB/s, 12.5 MB/s", "α 20 µs"):
        assert words in text
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert main(["info"]) == 1
    assert "puts rank 1 on host 1, but that rank runs on host 0" in capsys.readouterr().err


@pytest.mark.unit
def test_plan_prints_choice_bound_candidates_and_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    shape = ["--hosts", "2", "--ranks-per-host", "4"]
    command = [
        "plan",
        "all_reduce",
        "--bytes",
        "16MiB",
        *shape,
        "--print",
        "--rank",
        "3",
        "--replay",
        "--json",
        str(file),
    ]
    assert main(command) == 0
    text = capsys.readouterr().out
    for words in (
        "choice     pipelined chunks=8",
        "node cut",
        "ordered",
        "only where results shall",
        "rank 3:",
        "lane",
        "replayed:",
    ):
        assert words in text
    assert "rank 2:" not in text
    assert main(["plan", "--check", str(file)]) == 0
    assert "correct" in capsys.readouterr().out
    file.write_text(file.read_text().replace('"peer": 1', '"peer": 2', 1))
    assert main(["plan", "--check", str(file)]) == 1
    error = capsys.readouterr().err
    assert "plan.json" in error
    assert "rank" in error


@pytest.mark.unit
def test_plan_facts_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "all_to_all", "--bytes", "1KiB", "--hosts", "3", "--ranks-per-host", "2,1,1", "--facts"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["host_of"] == [0, 0, 1, 2]
    assert facts["choice"]["algorithm"] in {one["algorithm"] for one in facts["candidates"]}
    assert facts["bound"]["seconds"] == max(facts["bound"]["parts"].values()) > 0
    assert all(one["predicted_s"] or one["why_not"] for one in facts["candidates"])


@pytest.mark.unit
def test_plan_obeys_what_is_forced(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ["--hosts", "1", "--ranks-per-host", "5"]
    assert main(["plan", "broadcast", *shape, "--algorithm", "chain(chunks=3)"]) == 0
    assert "choice     chain chunks=3" in capsys.readouterr().out
    monkeypatch.setenv("NCCLX_ALGO", "broadcast=tree")
    assert main(["plan", "broadcast", *shape]) == 0
    assert "forced by NCCLX_ALGO=broadcast=tree" in capsys.readouterr().out
    assert main(["plan", "reduce_scatter", *shape, "--algorithm", "halving"]) == 1
    assert "halving can never run reduce_scatter here" in capsys.readouterr().err


@pytest.mark.unit
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Name a collective"),
        (["all_reduce", "--hosts", "2"], "belong together"),
        (["all_reduce", "--hosts", "2", "--ranks-per-host", "4,x"], "give one number, or one per host"),
        (["all_reduce", "--hosts", "2", "--ranks-per-host", "4,4,4"], "or 2 of them"),
        (["all_reduce", "--hosts", "0", "--ranks-per-host", "4"], "--hosts 0"),
        (["all_reduce", "--bytes", "many"], "'many' is not a size"),
        (["all_reduce", "--itemsize", "0"], "--itemsize 0"),
        (["all_reduce", "--rank", "1", "--print"], "--rank 1: there are ranks 0 to 0"),
        (["broadcast", "--root", "7"], "--root 7"),
        (["all_reduce", "--topology", "nowhere.toml"], "nowhere.toml cannot be read"),
        (["all_reduce", "--algorithm", "magic"], "algorithm = 'magic'"),
        (["--check", "nowhere.json"], "nowhere.json"),
        (["all_reduce", "--check", "nowhere.json"], "leave the collective out"),
    ],
)
def test_plan_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["plan", *arguments]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.unit
@pytest.mark.parametrize("arguments", [["probe"], ["tune", "all_reduce"]])
def test_what_measures_needs_a_launcher(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 1
    assert "No launcher started this process" in capsys.readouterr().err


@pytest.mark.unit
def test_a_broken_environment_fails_with_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["info"]) == 1
    assert "ncclx info: error: RANK=2 with WORLD_SIZE=2" in capsys.readouterr().err


@pytest.mark.unit
@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in ("info", "plan", "probe", "tune"))]
)
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
