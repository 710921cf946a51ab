"""From a configuration to the ``Scorer`` of a served teacher: servers found and examined on rank 0, known to every rank.

A server that is away when the run begins is waited for like one that fails later: with several addresses the run begins once
one of them answers, and the others join when they do. One that answers and does not fit ends the run at once. The first one's
fingerprint is kept in the run's folder, so that a run goes on with the model that it began with.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from rich.markup import escape
from transformers import PreTrainedModel

from distill.assembly import Parts
from distill.config import RunConfig
from distill.distributed import from_rank_0, gathered, raise_first, rank, total, world_size
from distill.endpoints import Backoff, Endpoint, key_from
from distill.errors import ConfigError, DistillError, ServerError
from distill.models import causal_lm
from distill.progress import console, say
from distill.runs import write_json
from distill.teachers.server.pool import Member, Pool
from distill.teachers.server.probe import Facts, Need, NotNow, examine, recheck, refusal, same
from distill.teachers.server.question import Question
from distill.teachers.server.scorer import ServerScorer

_TICK_S = 5.0
Found = tuple[Facts, list[str | None]]  # what the servers are, and per server why it is not there yet


def open_server(config: RunConfig, parts: Parts) -> ServerScorer:
    """All ranks call it together. Raises ConfigError, and ServerError for a server that does not fit or stays away."""
    section = config.teacher
    spec = section.server
    if not spec.url:
        raise ConfigError("teacher.placement=server needs an address; set teacher.server.url=[http://HOST:PORT]")
    if len(set(spec.url)) < len(spec.url):
        raise ConfigError(f"teacher.server.url={','.join(spec.url)} names a server twice; give each once")
    key = key_from(spec.key_variable)
    endpoints = [Endpoint(url, request_s=spec.request_s, key=key, name="teacher.server.url") for url in spec.url]
    need = need_of(config, parts)
    tick_s = min(_TICK_S, config.comm.timeout_s / 4)
    found = _found(lambda: _search(endpoints, need, spec.pause_s, spec.retry_s, known_file(config)), tick_s)
    members = [Member(e, suspect=late is not None, problem=late) for e, late in zip(endpoints, found[1], strict=True)]
    facts, examined = found[0], {e.address for e, late in zip(endpoints, found[1], strict=True) if late is None}

    def check(endpoint: Endpoint) -> None:
        if endpoint.address in examined:
            recheck(endpoint, need, facts)
        else:
            examine(endpoint, need, facts)
            examined.add(endpoint.address)

    pool = Pool(
        members,
        check,
        lambda endpoint, reply, what: refusal(endpoint, reply, need, what),
        retry_s=spec.retry_s,
        pause_s=spec.pause_s,
        note=_note,
    )
    question = Question(need.kind, need.wanted, facts.model)
    return ServerScorer(pool, question, concurrency=spec.concurrency, queue=section.queue, tick_s=tick_s, note=_note)


def need_of(config: RunConfig, parts: Parts) -> Need:
    """What the servers must be able to say. The teacher's vocabulary is known where ``model.teacher.path`` tells it."""
    known: PreTrainedModel = causal_lm(parts.student) if parts.teacher is None else parts.teacher
    return Need(
        tokenizer=parts.tokenizer,
        vocabulary=int(known.get_output_embeddings().weight.shape[0]),
        exact=parts.teacher is not None,
        context=config.train.max_length,
        kind=config.teacher.signal,
        top_k=config.teacher.top_k,
        model=config.teacher.server.model,
        key_variable=config.teacher.server.key_variable or "VLLM_API_KEY",
        path=config.model.teacher.path,
    )


def known_file(config: RunConfig) -> Path:
    """Where the run keeps its teacher's fingerprint."""
    return Path(config.run.dir) / "teacher_probe.json"


def _found(search: Callable[[], Found], tick_s: float) -> Found:
    """What the servers are, and per server why it is not there yet; found out by rank 0 while the others wait in short turns."""
    outcome: Future[Found] = Future()
    if rank() == 0:
        Thread(target=_settle, args=(outcome, search), daemon=True).start()
    while True:
        began = time.monotonic()
        while rank() == 0 and not outcome.done() and time.monotonic() - began < tick_s:
            time.sleep(0.005)
        waiting = float(rank() == 0 and not outcome.done())
        if not (total([waiting])[0] if world_size() > 1 else waiting):
            break
    error = outcome.exception() if rank() == 0 else None
    if error is not None and not isinstance(error, DistillError):
        raise error
    problem = None if error is None else str(error)
    raise_first(ServerError, gathered(problem) if world_size() > 1 else [problem])
    mine = outcome.result() if rank() == 0 else None
    if world_size() > 1:
        return from_rank_0(mine)
    assert mine is not None
    return mine


def _settle(outcome: Future[Found], work: Callable[[], Found]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:
        outcome.set_exception(error)


def _search(endpoints: list[Endpoint], need: Need, pause_s: float, retry_s: float, known: Path) -> Found:
    """Until one server answers. Raises ServerError where one does not fit, or none answers for ``pause_s``."""
    began, backoff, told = time.monotonic(), Backoff(min(retry_s, 10.0)), False
    while True:
        facts: Facts | None = None
        late: list[str | None] = []
        for endpoint in endpoints:
            try:
                facts = examine(endpoint, need, facts)
                late.append(None)
            except NotNow as error:
                late.append(str(error))
        problems = "; ".join(f"{e.address}: {text}" for e, text in zip(endpoints, late, strict=True) if text)
        if facts is not None:
            _remember(facts, need, known)
            _tell(facts, need, len(endpoints), problems)
            return facts, late
        waited_s = time.monotonic() - began
        if waited_s > pause_s:
            raise ServerError(
                f"no server of the teacher has answered for {waited_s:.0f} s (teacher.server.pause_s={pause_s:g}): {problems}. "
                "Start it, or correct teacher.server.url"
            )
        if not told:
            say(f"waiting for the teacher's server, up to {pause_s:g} s (teacher.server.pause_s): {problems}")
            told = True
        time.sleep(backoff.pause())


def _remember(facts: Facts, need: Need, known: Path) -> None:
    """Keep the fingerprint with the run. Raises ServerError where the run began with another model."""
    fingerprints: dict[str, list[float]] = {}
    if known.exists():
        try:
            found = json.loads(known.read_text())
            fingerprints = {str(name): [float(value) for value in values] for name, values in found.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ServerError(
                f"{known} does not tell which teacher this run began with ({type(error).__name__}: {error}); remove it to go on "
                "with the model that is served now"
            ) from None
    name = need.model or "teacher"
    before = fingerprints.get(name)
    if before is not None and (len(before) != len(facts.fingerprint) or not same(before, facts.fingerprint)):
        raise ServerError(
            f"'{facts.model}' is not the teacher that this run began with: it gives a probe other log-probabilities than {known} "
            "holds; serve the same weights as before, or use another run.dir"
        )
    if before is None and known.parent.is_dir():
        write_json(known, {**fingerprints, name: list(facts.fingerprint)})


def _tell(facts: Facts, need: Need, count: int, problems: str) -> None:
    what = {"topk": f"the top {need.wanted}", "sampled": "the sampled token", "logits": "every token"}[need.kind]
    how = "follow the sampling temperature (1 is asked for)" if facts.tempered else "ignore the sampling temperature"
    say(f"teacher '{facts.model}' on {count} server{'s' * (count > 1)}: {what}; its prompt log-probabilities {how}")
    if facts.doubt:
        say(f"[bold]{escape(facts.doubt)}[/bold]")
    if problems:
        say(f"not there yet: {problems}")


def _note(text: str) -> None:
    """To the person, from whichever rank it happens on."""
    console.print(text if world_size() == 1 else f"rank {rank()}: {text}")
