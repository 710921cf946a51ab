"""The models of a start and of memory: against what the exchange really asks, what is published, and sums by hand."""

from __future__ import annotations

import json

import pytest

from ncclx_py.bench.startup import fake
from ncclx_py.bench.startup import main as bench
from ncclx_py.cli import main
from ncclx_py.simulate import startup
from ncclx_py.simulate.memory import communicators, gpu_memory, host_memory
from ncclx_py.simulate.startup import fitted_figures, predict_start, published_starts
from ncclx_py.transport import exchange

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("size", [16, 96])
def test_requests_and_bytes_of_a_lazy_start_are_those_that_ranks_make(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (exchange, startup):
        monkeypatch.setattr(module, "_BATCH", 40)  # so that 96 ranks are three batches
    counted, predicted = fake(size), predict_start(size, groups=8, eager=False)
    assert counted["messages_per_rank"] == predicted.requests_per_rank
    assert counted["messages_of_rank_0"] == predicted.requests_of_rank_0
    # small groups compress worse than the 20,000 cards that the model's figure comes from
    assert predicted.bytes_per_rank * 0.8 < counted["bytes_per_rank"] < predicted.bytes_per_rank * 1.7
    assert counted["bytes_of_rank_0"] > counted["bytes_if_each_read_all"]


def test_only_an_eager_start_pays_for_groups_and_for_the_square_of_the_ranks() -> None:
    lazy = [predict_start(ranks, groups, eager=False) for ranks, groups in ((1024, 0), (1024, 9), (65536, 9))]
    assert lazy[0].seconds == lazy[1].seconds
    assert len({start.requests_per_rank for start in lazy}) == 1
    assert [start.connections_per_rank for start in lazy] == [0, 0, 0]
    one, ten = (predict_start(1024, groups, eager=True) for groups in (0, 9))
    assert ten.seconds == pytest.approx(10 * one.seconds)
    assert ten.connections_per_rank == 10 * 1023
    assert predict_start(4096, 0, eager=True).server_s == pytest.approx(16 * one.server_s, rel=1e-3)


def test_three_published_times_are_fitted_and_three_predicted() -> None:
    rows = published_starts()
    assert [(row.ranks, row.mode) for row in rows if row.fitted] == [(8192, "eager"), (8192, "lazy"), (98304, "lazy")]
    assert all(row.error == pytest.approx(0, abs=1e-9) for row in rows if row.fitted)
    predicted = {(row.ranks, row.mode): row.model_s for row in rows if not row.fitted}
    per_rank = (24.0 - 3.97) / 90112
    assert predicted[32768, "lazy"] == pytest.approx(3.97 + 24576 * per_rank)
    # what is left of 14.5 s once the base and the topology are taken off, four times; topology sixteen times
    base = 3.97 - 8192 * per_rank
    topology = 10 * (8192 / 49152) ** 2
    assert predicted[32768, "eager"] == pytest.approx(base + 4 * (14.5 - base - topology) + 16 * topology)
    assert {figure.source for figure in fitted_figures().values()} == {"fitted", "published"}


def test_memory_fits_the_eager_figure_alone() -> None:
    assert gpu_memory(65536, eager=True).total == pytest.approx(10e9)
    # per communicator 16 channels of (2 + 6) connections, against half with 2 and half with 6
    assert gpu_memory(65536, eager=False).total == pytest.approx((10e9 - 65536e4) / 2)
    assert communicators().value == pytest.approx((10e9 - 65536e4) / (16 * 8 * 9.19 * 2**20))


def test_memory_of_this_backend_grows_with_groups_and_peers_where_eager() -> None:
    lazy, eager = (host_memory(1024, 8, 4, mode) for mode in (False, True))
    assert lazy.parts["sockets"] == lazy.parts["gloo pairs"] == 0
    assert eager.parts["gloo pairs"] == 5 * 1023 * 3500
    assert eager.parts["cards"] == 5 * lazy.parts["cards"]
    assert lazy.parts["window words"] == 8 * 64 * 272 * 8  # neighbours, lanes, words of a block


def test_the_command_tells_figures_and_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["simulate", "startup", "--hosts", "16", "--gpus-per-host", "8", "--groups", "3"]
    assert main([*where, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["starts"]) == {"eager", "lazy"}
    assert {one["source"] for one in found["assumptions"].values()} == {"measured", "published", "fitted", "assumed"}
    assert main([*where, "--lazy"]) == 0
    text = capsys.readouterr().out
    assert "3 keys asked of the store" in text
    assert "1,16" not in text
    assert "265.00 s" in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--hosts", "4"],
        ["--hosts", "0", "--gpus-per-host", "8"],
        ["--hosts", "1", "--gpus-per-host", "1", "--groups", "-1"],
    ],
)
def test_a_start_that_cannot_be_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "startup", *arguments]) == 1
    assert "at least" in (said := capsys.readouterr().err) or "needs --hosts" in said


@pytest.mark.parametrize("arguments", [["--ranks", "1"], ["--ranks", "two"], ["--repeats", "0"]])
def test_the_benchmark_refuses_nonsense(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench([*arguments, "--fake", ""]) == 2
    assert "least" in (said := capsys.readouterr().err) or "whole numbers" in said
