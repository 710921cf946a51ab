"""How predictions are compared with measurements: figures worked out by hand, and a recorded measurement predicted anew."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ncclx_py.plans.spec_file import place
from ncclx_py.plans.topology import Link, Topology
from ncclx_py.simulate.accuracy import main
from ncclx_py.simulate.measured import Hosts, Links
from ncclx_py.simulate.recorded import Recorded
from ncclx_py.simulate.score import Point, Winners, is_slower, summarise

pytestmark = pytest.mark.unit


def point(algorithm: str, samples: float | tuple[float, ...], predicted: float, size: int = 1024) -> Point:
    several = samples if isinstance(samples, tuple) else (samples,) * 4
    return Point("2x2 200mbit", "all_reduce", size, algorithm, {}, (several,), predicted)


def test_errors_and_winners() -> None:
    points = [
        point("ring", 1.0, 1.1),  # 10 % off; predicted winner, but 4 % behind the best
        point("leader", 0.96, 1.2),  # 25 %
        point("direct", 2.0, 1.9),  # 5 %
        point("ring", 1.0, 1.0, 2048),  # right, and the winner
        point("leader", 3.0, 1.5, 2048),  # 50 %
        point("ring", (0.5, 1.3, 1.3), 1.3, 4096),  # predicted winner, 30 % behind, but not told apart
        point("leader", (0.9, 1.0, 1.1), 1.4, 4096),  # 40 %
        point("ring", 1.0, 1.0, 8192),  # alone: no contest
    ]
    found = summarise(points)
    assert found.points == 8
    assert found.median_error == pytest.approx((0.05 + 0.1) / 2)
    assert found.p90_error == pytest.approx(0.5)
    assert found.predicted == found.of_a_run == Winners(3, fastest=1, near=2, not_told_apart=2)
    assert found.ceiling == Winners(0, 0, 0, 0)


def test_the_ceiling_is_what_one_run_says_of_another() -> None:
    def runs(algorithm: str, predicted: float, *each: float, size: int = 1024) -> Point:
        return replace(point(algorithm, 1.0, predicted, size), runs=tuple((time,) * 4 for time in each))

    swaps = [
        runs("ring", 1.0, 1.0, 1.04),
        runs("leader", 2.0, 1.02, 1.0),
    ]  # each run has another winner, 4 and 2 % apart
    stays = [runs("ring", 2.0, 1.0, 1.2, size=2048), runs("leader", 1.0, 1.5, 1.4, size=2048)]
    once = [runs("ring", 1.0, 1.0, size=4096), runs("leader", 2.0, 1.0, 1.0, size=4096)]  # which run is missing?
    found = summarise([*swaps, *stays, *once])
    assert found.ceiling == Winners(4, fastest=2, near=4, not_told_apart=2)
    # all samples of the first: medians of 1.02 and 1.01; of its runs the prediction wins one, and is near in the other
    assert found.predicted == Winners(3, fastest=1, near=2, not_told_apart=2)
    assert found.of_a_run == Winners(4, fastest=1, near=2, not_told_apart=1)


def test_slower_is_what_few_shuffles_are() -> None:
    """Against every way to deal the values out, which is what the test's level means."""
    generator = random.Random(3)
    for _ in range(20):
        one = [generator.uniform(0.3, 1.3) for _ in range(5)]
        other = [generator.random() for _ in range(4)]
        pool, seen = one + other, []
        for chosen in itertools.combinations(range(9), 5):
            rest = [pool[place] for place in range(9) if place not in chosen]
            seen.append(sum(pool[a] > b for a in chosen for b in rest))
        above = sum(a > b for a in one for b in other)
        assert is_slower(one, other) == (sum(count >= above for count in seen) / len(seen) < 0.05)
    assert not is_slower([1.0] * 9, [1.0] * 9)


def recorded() -> Recorded:
    """A measurement with nonsense for predictions."""
    topology = Topology(place([4, 4], "block"), 1, Link(5e-5, 1e9), Link(1e-4, 1e9))
    call = Point("2x4", "all_reduce", 16 << 10, "ring", {}, ((5e-3,) * 3,))
    points = tuple(
        replace(point(name, 0.18, 9.0, 4 << 20), cluster="2x4 200mbit") for name in ("hierarchical", "halving_doubling")
    )
    links = Links("2x4", 128 << 10, ((1, 25e6), (16, 24e6)), 0.0)
    return Recorded("reno", 0.02, {"2x4": Hosts(topology, 2, (call,))}, {"2x4 200mbit": links}, points)


def test_recorded_measurements_are_predicted_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, again = tmp_path / "recorded.json", tmp_path / "again.json"
    file.write_text(json.dumps(recorded().to_json()))
    assert main(["--replay", str(file), str(file), "--json", str(again)]) == 0
    text = capsys.readouterr().out
    assert "1 MiB and more:    2 points" in text
    assert "reno; 2 % of the processors went to others" in text
    found = json.loads(again.read_text())
    (call,) = found["hosts"]["2x4"]["calls"]
    assert call["runs"] == [[5e-3] * 3] * 2  # both files' say what the machine costs
    for one in found["points"]:
        # 4 MiB each way over 25 MB/s, in the burst's favour by nothing; calls and messages add a few per cent
        assert 0.167 < one["predicted_s"] < 0.2
        assert one["runs"] == [[0.18] * 4] * 2


def broken(**changes: object) -> str:
    return json.dumps({**recorded().to_json(), **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"points": []}',
        broken(points=[]),
        broken(links={}),
        broken(hosts={"2x4": {}}),
        broken(points=[{**asdict(recorded().points[0]), "colour": 1}]),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(text)
    assert main(["--replay", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_recordings_of_different_networks_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "one.json", tmp_path / "other.json"]
    for file, control in zip(files, ("reno", "bbr")):
        file.write_text(broken(congestion_control=control))
    assert main(["--replay", *map(str, files)]) == 2
    assert "different congestion controls" in capsys.readouterr().err
    other = Links("2x4", 64 << 10, ((1, 25e6), (16, 24e6)), 0.0)
    files[1].write_text(broken(links={"2x4 200mbit": asdict(other)}))
    assert main(["--replay", *map(str, files)]) == 2
    assert "different links" in capsys.readouterr().err
