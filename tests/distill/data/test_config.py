"""Data configuration: every refusal names the key, the value and what is allowed; YAML files match the dataclasses."""

from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from distill.data import DataConfigError, build_task, data_config
from distill.data.config import CONFIGS, MISSING

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).parents[3] / "conf" / "data"


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_yaml_holds_exactly_the_keys_of_the_dataclass_with_its_defaults(name):
    plain = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert set(plain) == {field.name for field in fields(CONFIGS[name])}
    if plain.get("path") == MISSING:
        with pytest.raises(DataConfigError, match=r"data\.path=.*needs it"):
            data_config(plain)
        plain["path"] = "somewhere"
    assert asdict(data_config(plain)) == asdict(CONFIGS[name](**{k: plain[k] for k in ("path", "parts") if k in plain}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "running_sums"}, r"data\.name='running_sums'.*gsm8k.*did you mean running_sum\?"),
        ({}, r"data\.name=None"),
        ({"modulos": 7}, r"data\.modulos=7.*did you mean modulus\?.*min_terms"),
        ({"modulus": "ten"}, r"data\.modulus='ten'.*expected int or null, got str"),
        ({"modulus": 1}, r"data\.modulus=1.*2 to"),
        ({"modulus": True}, r"data\.modulus=True.*got bool"),
        ({"min_terms": 7}, r"data\.min_terms=7.*exceeds data\.max_terms=6"),
        ({"min_terms": 1}, r"data\.min_terms=1.*2 to 1000"),
        ({"max_digits": 19}, r"data\.max_digits=19"),
        ({"operators": "+/"}, r"data\.operators='\+/'.*\+ - \*"),
        ({"operators": "++"}, r"data\.operators"),
        ({"operators": "*", "modulus": None, "max_terms": 600, "max_digits": 5}, r"data\.modulus=None"),
        ({"train_size": 0}, r"data\.train_size=0"),
        ({"train_size": 2.5}, r"expected int, got float"),
        ({"seed": -1}, r"data\.seed=-1"),
        ({"on_bad": "ignore"}, r"data\.on_bad='ignore'.*error, skip"),
        ({"on_long": "cut"}, r"data\.on_long='cut'.*error, truncate, skip"),
        ({"name": "gsm8k", "path": "x", "template": "Q:"}, r"data\.template='Q:'.*\{question\}"),
        ({"name": "gsm8k", "path": "x", "chat": 1}, r"expected bool, got int"),
        ({"name": "gsm8k", "path": ""}, r"data\.path=''.*data=gsm8k needs it"),
        ({"name": "jsonl", "path": "x", "test_fraction": 1}, r"data\.test_fraction=1"),
        ({"name": "gsm_symbolic", "train_size": 10**7}, r"data\.train_size"),
        ({"name": "chain_sum", "answer_fallback": "first"}, r"data\.answer_fallback='first'.*last_number, none"),
    ],
)
def test_refusals(options, message):
    plain = options if not options or "name" in options else {"name": "running_sum", **options}
    with pytest.raises(DataConfigError, match=message):
        data_config(plain)


def test_integers_are_good_enough_for_fractions():
    assert data_config({"name": "jsonl", "path": "x", "test_fraction": 0}).test_fraction == 0


def test_only_two_splits_exist():
    with pytest.raises(DataConfigError, match=r"data\.split='validation'"):
        build_task(data_config({"name": "running_sum"}), "validation")


def test_a_space_without_test_problems_fails_at_the_start():
    """10 single-digit problems of two terms that all happen to be training problems would otherwise loop for ever."""
    from distill.data import running_sum

    config = data_config({"name": "running_sum"})
    task = build_task(config, "test")
    original, running_sum.split_of = running_sum.split_of, lambda text: "train"
    try:
        with pytest.raises(ValueError, match=r"no test problem found.*allow more terms or digits"):
            task[0]
    finally:
        running_sum.split_of = original
