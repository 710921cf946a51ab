"""What devices say of their links."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ncclx_py.device_facts import gpu_link, host_facts, nic_speed, parse_nvlink

NVLINK = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
\t Link 2: <inactive>
"""


@pytest.mark.unit
@pytest.mark.parametrize(("content", "speed"), [("10000\n", 1.25e9), ("-1\n", None), ("", None), ("fast", None)])
def test_the_speed_of_a_nic(tmp_path: Path, content: str, speed: float | None) -> None:
    (tmp_path / "eth0").mkdir()
    (tmp_path / "eth0" / "speed").write_text(content)
    assert nic_speed("eth0", tmp_path) == speed
    assert nic_speed("eth1", tmp_path) is None


@pytest.mark.unit
def test_nvlink() -> None:
    assert parse_nvlink(NVLINK) == pytest.approx(53.124e9)
    assert parse_nvlink("Unable to retrieve NVLink information") is None


@pytest.mark.unit
def test_this_host_has_a_fact_for_each_named_rail() -> None:
    facts = host_facts({"NCCLX_RAILS": "lo,lo"})
    assert len(facts.nics) == 2
    assert (facts.intra_bandwidth is None) or torch.cuda.is_available()


@pytest.mark.gpu
def test_a_gpu_has_a_link() -> None:
    link = gpu_link()
    assert link is not None
    assert 1e9 < link < 1e13
