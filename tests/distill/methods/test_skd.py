"""SKD is the monitored engine with another verdict: which, and what its options mean."""

from __future__ import annotations

from typing import Any

import pytest

from distill.config import load_config
from distill.errors import ConfigError
from distill.methods import Source, build_method
from distill.rollouts.monitored_options import MonitorOptions

pytestmark = pytest.mark.unit


def test_options_of_the_engine() -> None:
    method: Any = build_method(
        load_config("config", ["method=skd", "method.gamma=0.7", "method.step_tokens=50"]).method
    )
    assert method.monitor == MonitorOptions(
        value="student_ratio",
        epsilon=0.7,
        theta=0.0,
        rewind="step",
        max_breaches=0,
        keep_flawed=False,
        step_tokens=50,
    )
    assert method.uses() == {Source.MONITORED}
    assert build_method({"name": "skd"}).monitor.epsilon == 0.9  # type: ignore[attr-defined]


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"method.gamma=-1"):
        build_method({"name": "skd", "gamma": -1})
    with pytest.raises(ConfigError, match=r"did you mean 'gamma'"):
        build_method({"name": "skd", "gama": 0.5})
