"""What is on disk of a job: nothing, a run in progress, a trained model, or a complete outcome; and whether it is this job's.

``job.json`` says what a folder was made with: the resolved configuration, the number of ranks, and a digest of every
stage that it uses, so that a teacher trained anew makes everything after it out of date. ``outcome.json`` is written last.
A newer version that knows more keys finds its folders up to date, as long as the new keys have their defaults.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from distill.compare.plan import Job
from distill.config import EvalSection, defaults_of
from distill.errors import CheckpointError, ConfigError
from distill.progress import say
from distill.record_run import RecordsSection
from distill.runs import FREE_KEYS, differing_keys, write_json


def settings_of(job: Job) -> dict[str, Any]:
    """What decides the job's result, as it stands in ``job.json``."""
    after = {used.title: digest(used) for used in job.after}
    records = {} if job.records is None else {"records": asdict(job.records)}
    return {"ranks": job.ranks, "after": after, "train": job.config.resolved, **records}


def digest(job: Job) -> str:
    """A short name for the settings that the job's folder was made with, or will be, free of keys that change no result."""
    file = job.folder.path / "job.json"
    settings = _read(file) if file.exists() and not changes(job) else settings_of(job)
    settings["train"] = _without_free(settings["train"])
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _without_free(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without_free(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in values.items()
        if f"{prefix}{key}" not in FREE_KEYS
    }


def changes(job: Job) -> list[str]:
    """What differs between the folder's settings and the job's, in words; empty for a new folder or the same settings."""
    file = job.folder.path / "job.json"
    if not file.exists():
        return []
    before, now = _read(file), settings_of(job)
    differing = differing_keys(before["train"], now["train"], partial(defaults_of, job.config))
    records = partial(asdict, RecordsSection())
    differing += differing_keys(before.get("records", {}), now.get("records", {}), records, "records.")
    found = [f"{key}: {old!r} there, {new!r} now" for key, old, new in differing]
    if before["ranks"] != now["ranks"]:
        found.append(f"compare.ranks: {before['ranks']} there, {now['ranks']} now")
    for name in sorted({*before["after"], *now["after"]}):
        if before["after"].get(name) != now["after"].get(name):
            found.append(f"the model of {name} has changed")
    return found


def admit(jobs: Sequence[Job], changed: str) -> None:
    """Refuse folders that were made with other settings, or remove them under compare.changed=rerun.

    Raises ConfigError naming the first of them and what differs.
    """
    stale = {job.title: (job, words) for job in jobs if (words := changes(job))}
    if stale and changed == "refuse":
        job, words = next(iter(stale.values()))
        others = f", and {len(stale) - 1} other runs" if len(stale) > 1 else ""
        raise ConfigError(
            f"{job.folder.path} was made with other settings ({'; '.join(words[:4])}){others}; go back to them, choose another "
            "compare.dir, or set compare.changed=rerun to remove these runs and make them anew"
        )
    for job, words in stale.values():
        say(f"{job.title}: {'; '.join(words[:2])}; removed, to be made anew")
        shutil.rmtree(job.folder.path)
    evaluated_otherwise = [job for job in jobs if _outcome(job) is not None and not complete(job)]
    if evaluated_otherwise:
        say(f"`eval` has changed: {len(evaluated_otherwise)} trained models are evaluated anew, none is trained anew")


def begin(job: Job) -> None:
    """Make the folder and note its settings. Raises OSError on a full disk."""
    job.folder.path.mkdir(parents=True, exist_ok=True)
    write_json(job.folder.path / "job.json", settings_of(job))


def finish(job: Job, figures: dict[str, Any]) -> None:
    """Note the final measurement: the job is complete. Raises OSError on a full disk."""
    write_json(job.folder.path / "outcome.json", {"eval": job.evaluation, "figures": figures})


def complete(job: Job) -> dict[str, Any] | None:
    """The figures of a job that is done with these evaluation settings, or None."""
    outcome = _outcome(job)
    if outcome is None or differing_keys(outcome["eval"], job.evaluation, partial(asdict, EvalSection()), "eval."):
        return None
    return dict(outcome["figures"])


def _outcome(job: Job) -> dict[str, Any] | None:
    file = job.folder.path / "outcome.json"
    return _read(file) if file.exists() else None


def _read(file: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); remove {file.parent} to make this run anew") from None
