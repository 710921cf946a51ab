"""The demo of several teachers: what the comparison between both teachers and either alone rests on."""

import pytest

from distill.config import load_config
from distill.demo_teachers import STAGES, TASKS, recipe
from distill.engine import accumulation_steps

pytestmark = pytest.mark.unit


def test_one_teacher_alone_differs_in_the_teachers_only():
    both, *alone = (load_config("config", recipe(stage)) for stage in ("both", "sums_alone", "start_alone"))
    assert list(both.teacher.many) == list(TASKS)
    for task, config in zip(TASKS, alone, strict=True):
        assert list(config.teacher.many) == [task]
        assert {task, *config.teacher.many[task].tags} == set(TASKS)
        differing = {key for key in both.resolved if both.resolved[key] != config.resolved[key]}
        assert differing == {"teacher", "run"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_can_be_divided_over_the_ranks(ranks):
    for stage in STAGES:
        assert accumulation_steps(load_config("config", recipe(stage)).train, ranks) >= 1, stage


def test_an_expert_sees_its_own_task_and_every_stage_has_a_folder():
    configs = {stage: load_config("config", recipe(stage)) for stage in STAGES}
    assert len({config.run.dir for config in configs.values()}) == len(STAGES)
    for task in TASKS:
        shares = {name: part["share"] for name, part in configs[task].resolved["data"]["parts"].items()}
        assert {name for name, share in shares.items() if share} == {task}
        assert configs["both"].teacher.many[task].path == f"{configs[task].run.dir}/final"
