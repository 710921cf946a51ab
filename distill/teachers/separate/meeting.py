"""The start: teachers load their models and say what they are; students learn it, and get the heads that read hidden states."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import torch

from distill.assembly import Parts, check_teacher
from distill.config import RunConfig
from distill.distributed import device
from distill.engine import TORCH_DTYPES
from distill.errors import ConfigError, DistillError, ModelError, TeacherRankLost
from distill.methods import build_method
from distill.progress import say
from distill.stopping import AGAIN, ToldToStop
from distill.teachers.frozen import FrozenModel
from distill.teachers.separate.bridge import Bridge, BridgeError, Seats
from distill.teachers.separate.recovery import next_bridge
from distill.teachers.separate.roles import LEFT, Job, current_job, heard
from distill.teachers.separate.services import Service, list_services
from distill.teachers.separate.serving import Server
from distill.teachers.separate.sharding import load_served
from distill.teachers.separate.student import Separate
from distill.teachers.signals import Head
from distill.teachers.wire import wire_dtype

LOAD_S = 3600.0  # within which every teacher rank has loaded its models


def open_separate(config: RunConfig, parts: Parts) -> dict[str, Separate]:
    """A student's scorers, by the names of their services: "teacher" or those of ``teacher.many``, and "reference" where
    ``model.reference.path`` is set. All ranks of the job meet here. Raises what a teacher rank raised while it loaded."""
    job = current_job()
    services = list_services(config, parts.method, job.seats.students, len(job.seats.ranks))
    try:
        known = _meet(config, job.bridge, services)
        heads = _share_heads(job.bridge, known, {})
    except BridgeError as error:
        raise TeacherRankLost(job.bridge.why(error)) from error
    job.met = True
    return {one.name: Separate(job.client, one, heads.get(one.number), config.teacher.queue) for one in known}


def serve(config: RunConfig, job: Job) -> dict[str, Any]:
    """A teacher rank's whole life. Raises ToldToStop where the students were told to, StudentsLeft where they failed."""
    try:
        status = _serve(config, job)
    except BridgeError as error:
        left = _left(job)
        if left is None:
            raise Broken(f"this teacher rank cannot go on: {job.bridge.why(error)}") from error
        status = left
    if status == AGAIN:
        raise ToldToStop("told to stop")
    if status:
        raise StudentsLeft(f"the students left with exit status {status}; rank 0 says why")
    return {}


def _serve(config: RunConfig, job: Job) -> int:
    services = list_services(config, build_method(config.method), job.seats.students, len(job.seats.ranks))
    models: dict[int, FrozenModel] = {}
    try:
        here = [s for s in services if job.seats.me in s.places or config.teacher.shard != "none"]
        models = {s.number: load_served(config, s.spec, s.name) for s in here}
        hello: dict[str, Any] = {"services": [_facts(s, models[s.number]) for s in here]}
    except DistillError as error:
        hello = {"error": str(error)}
    job.bridge.store.set(_hello(job.seats, job.seats.me), json.dumps(hello))
    known = {service.number: service for service in _meet(config, job.bridge, services)}
    _share_heads(job.bridge, list(known.values()), models)
    for service in known.values():
        places, sharded = service.places, config.teacher.shard != "none"
        if sharded:  # one of its ranks answers; all of them hold a part
            places = tuple(range(job.seats.students, len(job.seats.ranks)))
        how = f"{service.kind}{f', in parts (teacher.shard={config.teacher.shard})' if sharded else ''}"
        say(f"{service.name} ({service.spec.path}) on {job.seats.named(places)} of the job, as {how}")
    server = Server(job.bridge, known, models)
    while True:
        try:
            return server.run()
        except BridgeError:
            if config.teacher.on_loss != "continue" or _left(job) is not None:
                raise
            job.client.bridge = next_bridge(job.bridge)
            server.move_to(job.bridge)


def _left(job: Job) -> int | None:
    """The exit status that students left with; None where they did not say."""
    try:
        if not job.bridge.store.check([LEFT]):
            return None
        status = int(job.bridge.store.get(LEFT))
        job.bridge.store.set(heard(job.seats.ranks[job.seats.me]), "")
        return status
    except RuntimeError:  # the store has gone with the rank that kept it
        return None


class Broken(DistillError):
    """A rank of the job is gone."""

    exit_status = 1


class StudentsLeft(DistillError):
    """The students of a teacher rank have failed together."""

    on_every_rank = True


def check_separate(config: RunConfig) -> None:
    """Raises ConfigError for what separate teachers cannot do; on every rank alike, before they meet."""
    method = build_method(config.method)
    check_teacher(config, method)
    if "teacher" not in method.needs and not ("reference" in method.needs and config.model.reference.path):
        raise ConfigError(
            f"method={config.method['name']} reads neither a teacher nor model.reference.path, so that the ranks of "
            "teacher.placement=separate would have nothing to do; set teacher.placement=colocated"
        )
    if config.engine.replicas.enabled:
        raise ConfigError(
            "engine.replicas.enabled=true and teacher.placement=separate do not go together: each replica is a job of students; "
            "set teacher.placement=server, or engine.replicas.enabled=false"
        )
    if config.teacher.on_loss == "continue" and config.teacher.shard != "none":
        raise ConfigError(
            f"teacher.on_loss=continue cannot go on without a part of a model, as teacher.shard={config.teacher.shard} makes them; "
            "set teacher.on_loss=stop"
        )
    if config.teacher.on_loss == "continue" and config.comm.backend != "ncclx":
        raise ConfigError(
            f"teacher.on_loss=continue needs to learn who is left, which comm.backend={config.comm.backend} cannot tell; set "
            "comm=ncclx, or teacher.on_loss=stop"
        )


def _facts(service: Service, model: FrozenModel) -> dict[str, Any]:
    head = model.head
    return {
        "number": service.number,
        "dtype": next(name for name, dtype in TORCH_DTYPES.items() if dtype == head.weight.dtype),
        "shape": list(head.weight.shape),
        "bias": head.bias is not None,
        "scale": head.scale,
        "softcap": head.softcap,
        "fingerprint": model.fingerprint(),
    }


def _hello(seats: Seats, place: int) -> str:
    return f"teachers/hello/{seats.ranks[place]}"


def _meet(config: RunConfig, bridge: Bridge, services: list[Service]) -> list[Service]:
    """Reads what every teacher rank says of itself, and raises its error on all ranks alike."""
    seats = bridge.seats
    facts: dict[int, dict[str, Any]] = {}
    for place in range(seats.students, len(seats.ranks)):
        hello = json.loads(_await(bridge, _hello(seats, place)))
        if "error" in hello:
            raise _together(hello["error"])
        for one in hello["services"]:
            if one["fingerprint"] != facts.setdefault(one["number"], one)["fingerprint"]:
                name = services[one["number"]].name
                raise _together(
                    f"{seats.named([place])} of the job has loaded other weights for the {name} than the teacher ranks before it; "
                    "give all hosts the same files"
                )
    return [_known(config, service, facts[service.number]) for service in services]


def _together(text: str) -> ModelError:
    error = ModelError(text)
    error.on_every_rank = True
    return error


def _await(bridge: Bridge, key: str) -> str:
    """The value of a key that a teacher rank sets when it has loaded its models. Raises BridgeError."""
    until = time.monotonic() + LOAD_S
    try:
        while not bridge.store.check([key]):
            if bridge.lost() or bridge.store.check([LEFT]):
                raise BridgeError("it ended while the teachers were being loaded")
            if time.monotonic() > until:
                raise BridgeError(
                    f"a teacher rank has not loaded its models within {LOAD_S:g} s (it has not set {key})"
                )
            time.sleep(0.05)
        return str(bridge.store.get(key).decode())
    except RuntimeError as error:
        raise BridgeError(f"the job's store has gone while the teachers were being loaded: {error}") from error


def _known(config: RunConfig, service: Service, facts: dict[str, Any]) -> Service:
    vocabulary, hidden_size = facts["shape"]
    return replace(
        service,
        wire=wire_dtype(config.teacher.wire, TORCH_DTYPES[facts["dtype"]]),
        own=TORCH_DTYPES[facts["dtype"]],
        hidden_size=hidden_size,
        vocabulary=vocabulary,
        bias=facts["bias"],
        scale=facts["scale"],
        softcap=facts["softcap"],
        fingerprint=tuple(facts["fingerprint"]),
    )


def _share_heads(bridge: Bridge, services: list[Service], models: dict[int, FrozenModel]) -> dict[int, Head]:
    """What reads hidden states, from the first rank of each service to all; nothing for other signals."""
    heads = {}
    for service in services:
        if service.kind != "hidden":
            continue
        model = models.get(service.number) if bridge.seats.me == service.places[0] else None
        weight = torch.empty(service.vocabulary, service.hidden_size, dtype=service.own, device=bridge.device)
        bias = torch.empty(service.vocabulary, dtype=service.own, device=bridge.device) if service.bias else None
        if model is not None:
            weight, bias = model.head.weight.detach(), model.head.bias
        for part in (weight, bias):
            if part is not None:
                bridge.broadcast(part.to(bridge.device), service.places[0])
        if not bridge.seats.teaches:
            heads[service.number] = Head(
                weight.to(device()), None if bias is None else bias.to(device()), service.scale, service.softcap
            )
    return heads
