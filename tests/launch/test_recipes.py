"""The recipes: shell that bash can read, and jobs whose settings fit the ranks that they ask for."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from distill.config import load_config
from distill.engine import accumulation_steps
from distill.methods import build_method

pytestmark = pytest.mark.unit

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"


def test_bash_can_read_all() -> None:
    scripts = sorted(RECIPES.glob("*.sh"))
    assert len(scripts) >= 5
    for script in scripts:
        assert subprocess.run(["bash", "-n", script], timeout=30, check=False).returncode == 0, script
        assert os.access(script, os.X_OK), f"{script} cannot be executed"


@pytest.mark.parametrize(("name", "ranks"), [("one_node", 8), ("two_by_eight", 16)])
def test_the_job_of_a_recipe_can_start(name: str, ranks: int, tmp_path: Path) -> None:
    """What its batch script would run is a configuration that the trainer accepts on that many ranks."""
    env = {**os.environ, "DRY": "1", "RAILS": "ib0,ib1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = [str(RECIPES / f"{name}.sh"), "STUDENT", "TEACHER", "two words.jsonl", "train.steps=3"]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("program=("))
    _, _, *program = shlex.split(line.removeprefix("program=(").removesuffix(")"))
    assert program[:2] == ["-m", "distill.train"]
    config = load_config("config", program[2:])
    build_method(config.method)
    assert accumulation_steps(config.train, ranks) >= 1
    assert (config.train.steps, config.resolved["data"]["path"]) == (3, "two words.jsonl")
