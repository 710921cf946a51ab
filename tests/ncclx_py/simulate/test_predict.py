"""Predictions: the best of what is played, by whichever way it is played; the critical path; and the command."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from ncclx_py.cli import main
from ncclx_py.plans.algorithms.registry import ALGORITHMS, build
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.replay import replay
from ncclx_py.plans.spec_file import place
from ncclx_py.plans.topology import Link, Tier, Topology
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.path import critical_path
from ncclx_py.simulate.predict import CLASSES, CLOSED, EVENTS, predict

pytestmark = pytest.mark.unit

MIB = 1 << 20
INTRA, INTER = Link(5e-6, 8e9), Link(5e-5, 1.25e9)


def world(hosts: int, width: int, rails: int = 1) -> Topology:
    return Topology(place([width] * hosts, "block"), rails, INTRA, INTER)


@pytest.mark.parametrize("collective", ["all_reduce", "all_to_all", "broadcast"])
def test_the_answer_is_the_best_of_what_takes_part(collective: str) -> None:
    topology = world(4, 2, 2)
    found = predict(collective, Cluster(topology), MIB)  # type: ignore[arg-type]
    problem = uniform(collective, 8, MIB, 4)  # type: ignore[arg-type]
    again = replay(build(problem, topology, found.algorithm, found.parameters), topology, 4).seconds
    assert found.seconds == pytest.approx(again, rel=0.02)
    for name, known in ALGORITHMS[collective].items():
        for chunks in [{"chunks": n} for n in (1, 4)] if "chunks" in known.parameters else [{}]:
            other = replay(build(problem, topology, name, chunks), topology, 4).seconds
            assert found.seconds <= 1.1 * other  # the closed forms say which three are played
    assert found.bound.seconds <= found.seconds


def test_all_ranks_and_one_of_each_class_agree() -> None:
    cluster = Cluster(world(8, 2, 2))
    short, long = (predict("all_reduce", cluster, 4 * MIB, every_rank=every) for every in (False, True))
    assert (short.method, long.method) == (CLASSES, EVENTS)
    assert short.algorithm == long.algorithm
    assert short.seconds == pytest.approx(long.seconds, rel=0.02)


def test_a_fault_makes_ranks_differ() -> None:
    healthy = predict("all_reduce", Cluster(world(4, 2)), MIB)
    late = predict("all_reduce", Cluster(world(4, 2), delays={1: 0.5}), MIB)
    assert late.method == EVENTS
    assert 0.5 < late.seconds <= 0.5 + 2 * healthy.seconds


@pytest.mark.parametrize("collective", ["all_reduce", "all_to_all"])
def test_a_hundred_thousand_ranks(collective: str) -> None:
    topology = Topology(place([8] * 16384, "block"), 8, Link(3.4e-6, 370e9), Link(14e-6, 50e9))
    found = predict(collective, Cluster(topology), 1 << 30)  # type: ignore[arg-type]
    assert found.ranks == 131072
    assert found.bound.seconds < found.seconds < 30 * found.bound.seconds
    if collective == "all_reduce":  # 2 x 14 rounds between hosts, and 1 GiB once out and in of every host, over 8 NICs
        assert found.method == CLASSES
        assert found.seconds > 28 * 14e-6 + (1 << 30) / 8 / 50e9
    else:
        assert found.method == CLOSED


def test_what_the_closed_form_leaves_out_is_said() -> None:
    topology = Topology(place([8] * 16384, "block"), 8)
    found = predict("all_to_all", Cluster(topology, (Tier("rack", 16, 1e-4),)), 1 << 30)
    assert "not counted" in found.note


@pytest.mark.parametrize("name", ["hierarchical", "double_tree", "ring"])
def test_the_critical_path_leads_without_gaps_from_the_start_to_the_end(name: str) -> None:
    cluster = Cluster(world(3, 2), delays={4: 2e-3})
    found = predict("all_reduce", cluster, MIB, algorithm=name)
    assert found.outcome is not None
    path = critical_path(found.outcome)
    assert path[-1].end_s == pytest.approx(found.seconds)
    assert path[0].rank == 4  # everyone waits for the late one
    assert path[0].start_s == pytest.approx(2e-3)
    for before, after in itertools.pairwise(path):
        assert after.start_s <= before.end_s + 2 * INTER.alpha
        assert after.end_s >= before.start_s


def test_the_command_answers_programs_and_persons(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spec = tmp_path / "cluster.toml"
    spec.write_text(
        'hosts = 4\nranks_per_host = 2\nrails = 2\n[inter]\nalpha = "50us"\nbandwidth = "1Gbit/s"\n'
        '[[tier]]\nname = "rack"\nhosts = 2\nalpha = "1ms"\noversubscription = 4\n'
    )
    picture = tmp_path / "timeline.png"
    assert (
        main(["simulate", "all_reduce", "--topology", str(spec), "--bytes", "1MiB", "--json", "--png", str(picture)])
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert {"algorithm", "predicted_s", "bound_s", "plan_s", "peak_rss_bytes", "ranks"} <= facts.keys()
    assert facts["ranks"] == 8
    assert facts["predicted_s"] > 1e-3  # a rack was crossed
    assert any(link["link"].startswith("rack") for link in facts["busiest"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (
        main(
            ["simulate", "all_reduce", "--topology", str(spec), "--fail", "link=1.0", "--straggler", "rank=3,factor=2"]
        )
        == 0
    )
    assert "critical path" in capsys.readouterr().out


def test_a_sweep_has_a_point_for_each_size_and_scale(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    picture = tmp_path / "sweep.png"
    words = "simulate all_reduce --gpus-per-host 2 --sweep-hosts 2,8 --sweep-bytes 64KiB,1MiB --json --plot"
    assert main([*words.split(), str(picture)]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [(point["hosts"], point["bytes"]) for point in points] == [(2, 65536), (2, MIB), (8, 65536), (8, MIB)]
    assert all(point["predicted_s"] >= point["bound_s"] for point in points)
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--hosts 2", "--gpus-per-host"),
        ("--hosts 0 --gpus-per-host 2", "at least 1"),
        ("--hosts 2 --gpus-per-host 2 --bytes 0", "at least one byte"),
        ("--hosts 2 --gpus-per-host 2 --fail nic=3", "'nic' is none of link, share"),
        ("--hosts 2 --gpus-per-host 2 --fail link=9.0", "no NIC 0 of host 9"),
        ("--hosts 2 --gpus-per-host 2 --fail link=0.0,share=2", "from 0 to below 1"),
        ("--hosts 2 --gpus-per-host 2 --straggler rank=1", "factor"),
        ("--hosts 2 --gpus-per-host 2 --straggler rank=1,factor=fast", "write rank=R,factor=3"),
        ("--hosts 2 --gpus-per-host 2 --algorithm magic", "no algorithm 'magic'"),
        ("--hosts 2 --gpus-per-host 2 --plot x.png", "--sweep-bytes"),
        ("--gpus-per-host 2 --sweep-hosts two", "whole numbers"),
    ],
)
def test_bad_words_are_named(words: str, says: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["simulate", "all_reduce", *words.split()]) == 1
    assert says in capsys.readouterr().err
