"""The demo's recipes: what the comparison between student and control rests on."""

import pytest

from distill.config import load_config
from distill.demo import STAGES, recipe

pytestmark = pytest.mark.unit


def test_student_and_control_differ_in_the_method_only():
    student, control = (load_config("config", recipe(stage)).resolved for stage in ("student", "control"))
    differing = {key for key in student if student[key] != control[key]}
    assert differing == {"method", "run"}
    assert (student["method"]["name"], control["method"]["name"]) == ("motab", "sft")
    assert {key for key in student["run"] if student["run"][key] != control["run"][key]} == {"dir"}


def test_every_stage_has_a_recipe_and_a_folder_of_its_own():
    folders = [load_config("config", recipe(stage)).run.dir for stage in STAGES]
    assert len(set(folders)) == len(STAGES)
