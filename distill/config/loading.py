"""From YAML and overrides to a checked ``RunConfig``; Hydra's errors in words that a person can act on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config.checks import and_above, build, nearest
from distill.config.sections import SECTIONS, RunConfig
from distill.data import DataConfigError, data_config
from distill.errors import ConfigError

MAX_BRACKETS = 200  # in one override


def load_config(name: str, overrides: Sequence[str]) -> RunConfig:
    """Compose ``conf/<name>.yaml`` with ``key=value`` overrides and check all of it.

    Raises ConfigError for an unknown key, group or value (with the nearest valid one), or a value out of range.
    """
    config = check_config(compose_config(name, overrides))
    config.origin = (name, tuple(overrides))
    return config


def defaults_of(config: RunConfig) -> dict[str, Any]:
    """The value that ``conf/`` gives every key where nothing is overridden: the same choice in each group, no experiment.

    What a run that was started before a key existed did, is what the key's default does now (``distill.runs``).
    """
    return _defaults(config.origin[0], _choices(*config.origin))


@cache
def _choices(name: str, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """The choices in the groups that these overrides lead to, as overrides."""
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        choices = compose(config_name=name, overrides=list(overrides), return_hydra_config=True).hydra.runtime.choices
    known = {path.name for path in conf_folder().iterdir()} - {"experiment"}
    return tuple(f"{group}={choice}" for group, choice in choices.items() if group in known and choice is not None)


@cache
def _defaults(name: str, choices: tuple[str, ...]) -> dict[str, Any]:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        plain = OmegaConf.to_container(compose(config_name=name, overrides=list(choices)), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def compose_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """Hydra's composition with errors a person can read."""
    for override in overrides:
        if sum(map(override.count, "[{(")) > MAX_BRACKETS:  # Hydra's parser would take minutes, or run out of stack
            raise ConfigError(
                f"'{override[:40]}…' has more than {MAX_BRACKETS} brackets; write such a value into a file"
            )
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        try:
            return compose(config_name=name, overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_explain(error, name, overrides)) from None
        except (ValueError, OSError) as error:  # Hydra's, of a group that is no name, or longer than a file's may be
            raise ConfigError(f"{str(error)[:200]}; check {', '.join(each[:40] for each in overrides)}") from None


def check_config(composed: DictConfig) -> RunConfig:
    """Turn a composed mapping into the checked RunConfig."""
    try:
        resolved = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"'{error.full_key}' has no value; set {error.full_key}=…") from None
    assert isinstance(resolved, dict)
    plain = {str(key): value for key, value in resolved.items()}
    known = ("seed", "data", "method", *SECTIONS)
    for key in plain:
        if key not in known:
            raise ConfigError(
                f"unknown section '{key}'; {nearest(key, known)}; experiments with `compare` and `entries` are for "
                "`distill compare`"
            )
    for key in known:
        if key not in plain:
            raise ConfigError(f"the section '{key}' is missing; do not delete it")
        if key != "seed" and not isinstance(plain[key], dict):
            raise ConfigError(f"{key}={plain[key]} is not a section; set its keys one by one, as {key}.KEY=VALUE")
    if type(plain["seed"]) is not int:
        raise ConfigError(f"seed={plain['seed']} is not a whole number")
    sections: dict[str, Any] = {key: build(cls, plain[key], key) for key, cls in SECTIONS.items()}
    try:
        data = data_config(plain["data"])
    except DataConfigError as error:
        raise ConfigError(str(error)) from None
    return RunConfig(seed=int(plain["seed"]), data=data, method=plain["method"], resolved=plain, **sections)


def conf_folder() -> Path:
    """The folder of YAML groups: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(path for path in (package / "conf", package.parent / "conf") if (path / "config.yaml").is_file())


def _explain(error: Exception, name: str, overrides: Sequence[str]) -> str:
    """Name the override that failed and the nearest valid key or group choice."""
    groups = {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in conf_folder().iterdir() if p.is_dir()}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in groups and value not in (*groups[key], "null"):
            return f"{key}={value}: no such choice in conf/{key}; {nearest(value, groups[key])}"
    good = [o for o in overrides if o.partition("=")[0] in groups]
    try:
        composed = compose(config_name=name, overrides=good)
    except (HydraException, OmegaConfBaseException):
        return str(error).splitlines()[0]
    valid = set(_flat_keys(composed)) | set(groups)
    for override in overrides:
        key, separator, _ = override.lstrip("+~").partition("=")
        if not separator:
            return f"'{override}' is not of the form key=value"
        if any(OmegaConf.select(composed, part) == {} for part in and_above(key)) and not override.startswith("+"):
            return f"{key} takes new names; put a plus in front: '+{override}'"
        if key not in valid:
            return f"unknown key '{key}'; {nearest(key, valid)}"
    return str(error).splitlines()[0]


def _flat_keys(config: DictConfig, prefix: str = "") -> Iterable[str]:
    for key in map(str, config):
        full = f"{prefix}{key}"
        yield full
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            yield from _flat_keys(config[key], f"{full}.")
