"""The run folder: metrics cut back, files replaced whole, one job at a time, export in order."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import defaults_of, load_config
from distill.errors import CheckpointError, ConfigError
from distill.metrics import MetricsLog, cut_back, read_metrics
from distill.plots import plot_curves
from distill.runs import RunFolder, differing_keys, replace_folder, write_atomically
from distill.seeds import mix

pytestmark = pytest.mark.unit


def test_metrics_are_cut_back_to_the_checkpoint_and_survive_half_a_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "train/loss": step / 2}) for step in range(1, 6)]
    file.write_text("\n".join(whole) + '\n{"step": 6, "train/l')
    assert [row["step"] for row in read_metrics(file)] == [1, 2, 3, 4, 5]
    cut_back(file, 3)
    assert file.read_text() == "\n".join(whole[:3]) + "\n"
    cut_back(tmp_path / "absent.jsonl", 3)


def test_metrics_go_to_the_file_and_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from distill.config import RunSection

    log = MetricsLog(RunFolder(tmp_path), RunSection(), 0, {})
    for step in (1, 2):
        log.write(step, {"train/loss": 1.0 / step})
    log.close()
    assert [row["train/loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 0.5]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_atomically(file, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_folders_are_replaced_whole(tmp_path: Path) -> None:
    for name, text in (("final", "old"), (".final.partial", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(text)
    replace_folder(tmp_path / ".final.partial", tmp_path / "final")
    assert (tmp_path / "final" / "model").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_folder_belongs_to_one_job(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    first.enter({"seed": 1}, "auto")
    with pytest.raises(ConfigError, match="in use by another running job"):
        RunFolder(tmp_path / "run").enter({"seed": 1}, "auto")
    first.leave()
    RunFolder(tmp_path / "run").enter({"seed": 1}, "must")
    with pytest.raises(ConfigError, match="holds no run to continue"):
        RunFolder(tmp_path / "none").enter({"seed": 1}, "must")


def test_only_what_changes_a_result_counts_as_another_configuration() -> None:
    before = {"seed": 1, "train": {"steps": 5, "log_every": 1}, "run": {"dir": "a"}}
    now = {"seed": 1, "train": {"steps": 6, "log_every": 9}, "run": {"dir": "b"}, "extra": 2}
    assert differing_keys(before, now) == [("extra", None, 2), ("train.steps", 5, 6)]


def test_a_key_that_an_older_run_did_not_know_is_no_difference_where_it_has_its_default() -> None:
    before = {"seed": 1, "method": {"prior": None}}
    defaults = {"seed": 0, "train": {"clip": 1.0, "limit": 5}, "method": {"prior": {"weight": 1}}}

    def differing(**now: Any) -> list[tuple[str, Any, Any]]:
        return differing_keys(before, before | now, lambda: defaults)

    assert differing(train={"clip": 1.0, "limit": 5}) == []
    assert differing(train={"clip": 2.0, "limit": None}) == [("train.clip", 1.0, 2.0), ("train.limit", 5, None)]
    assert differing(seed=0) == [("seed", 1, 0)]  # there, and not the default
    assert differing(method={"prior": {"weight": 1}}) == [("method.prior.weight", None, 1)]
    assert differing(other=1) == [("other", None, 1)]  # has no default


def test_a_run_is_continued_after_an_upgrade_that_brought_a_key(tmp_path: Path) -> None:
    config = load_config("config", ["method=gkd", "experiment=demo_student", "model.teacher.path=x", "train.steps=3"])
    folder = RunFolder(tmp_path)
    folder.enter(config.resolved, "auto")
    folder.leave()
    older = yaml.safe_load(folder.config.read_text())
    del older["method"]["lambda_"], older["teacher"], older["train"]["loss_bytes"]
    folder.config.write_text(yaml.safe_dump(older))
    folder.enter(config.resolved, "must", partial(defaults_of, config))
    folder.leave()
    other = load_config("config", [*config.origin[1], "method.lambda_=0.75"])
    with pytest.raises(CheckpointError, match=r"method.lambda_: 0.5 there, 0.75 now\)"):
        RunFolder(tmp_path).enter(other.resolved, "auto", partial(defaults_of, other))


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    rows = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0, "eval/pass_at_1": 0.5}]
    plot_curves(rows, tmp_path / "curves.png", "a run")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_random_choices_are_spread_and_reproducible() -> None:
    values = {mix(seed, sample) for seed in range(50) for sample in range(50)}
    assert len(values) == 2500
    assert mix(1, 2) == 0x4E457FC668DAAE45  # frozen: another value would change every run's samples
    assert mix(1, 2) != mix(2, 1)
