"""The servers of one run: started or found, checked, given the student's weights, and asked for rollouts by every rank.

Rank 0 starts what the run has to start and ends it; all ranks talk to the same two servers, each for its own share. A model whose
text the method does not ask for gets no server. Servers of the run's own start with the first `refresh`, the student's
from its weights as they are then; each later one loads new weights in place. In ``distill rollout`` no weights change, and `serve`
starts both from their folders.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import RunConfig, ServerSpec
from distill.distributed import all_or_nothing, device, from_rank_0, rank, world_size
from distill.errors import ConfigError, ServerError
from distill.methods.base import Source
from distill.methods.motab import MonitoredMethod
from distill.models import causal_lm
from distill.monitors import BY_STUDENT
from distill.progress import say
from distill.rollouts.engines import Who
from distill.rollouts.generator import eos_ids
from distill.rollouts.monitored_scheduler import vocabulary
from distill.rollouts.vllm.checks import check_server
from distill.rollouts.vllm.client import Server
from distill.rollouts.vllm.generator import Decoder, VllmGenerator
from distill.rollouts.vllm.http import Http
from distill.rollouts.vllm.monitored import VllmMonitored
from distill.rollouts.vllm.processes import OwnServer, command
from distill.rollouts.vllm.weights import compare, reload, save

if TYPE_CHECKING:
    from distill.methods.base import Method


class VllmEngine:
    """See the module and `distill.rollouts.engines.Engine`."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        method: Method,
        student: nn.Module,
        teacher: PreTrainedModel | None,
        folder: Path,
    ) -> None:
        self._config, self._tokenizer, self._method = config, tokenizer, method
        self._needed = needed_servers(method)
        self._models: dict[Who, PreTrainedModel] = {"student": causal_lm(student)}
        if teacher is not None:
            self._models["teacher"] = teacher
        self._logs = folder / "vllm"
        self._weights = Path(config.rollout.vllm.weights or self._logs) / "student"
        self._own: dict[Who, OwnServer] = {}
        self._connected = False
        self._top_k = method.monitor.top_k if isinstance(method, MonitoredMethod) else 1
        self._check_config()
        cached = config.rollout.vllm.cached_scoring
        self.servers = {who: Server(who, vocabulary(self._models[who]), cached) for who in self._needed}

    def refresh(self, student: nn.Module | None) -> None:
        first = not self._connected
        writes = "student" in self._needed
        with all_or_nothing(ServerError):
            if rank() == 0:
                if writes:
                    assert student is not None
                    save(student, self._tokenizer, self._weights, untie=device().type == "cpu")
                self._start(str(self._weights))
        if first:
            self._connect()
        with all_or_nothing(ServerError):
            if rank() == 0 and writes:
                assert student is not None
                server = self.servers["student"]
                if not first or "student" not in self._own:  # one just started has these weights
                    reload(server, self._weights)
                compare(server, student)

    def serve(self) -> None:
        with all_or_nothing(ServerError):
            if rank() == 0:
                self._start(self._config.model.student.path)
        self._connect()

    def generator(self, who: Who, model: PreTrainedModel) -> VllmGenerator:
        rollout, context = self._config.rollout, self._config.train.max_length
        return VllmGenerator(self._decoder(who, None), self._tokenizer, slots=rollout.slots, context_length=context)

    def writer(self, student: PreTrainedModel) -> VllmMonitored:
        # Here, not above: distill.samples imports the engines.
        from distill.samples import sampling_params

        assert isinstance(self._method, MonitoredMethod)
        shared = min(vocabulary(model) for model in self._models.values())
        return VllmMonitored(
            self._decoder("student", shared),
            self._decoder("teacher", shared),
            self._tokenizer,
            self._method.monitor,
            sampling_params(self._config.rollout),
            slots=self._config.rollout.slots,
            context_length=self._config.train.max_length,
        )

    def close(self) -> None:
        for server in self._own.values():
            server.stop()
        self._own, self._connected = {}, False
        if rank() == 0:
            shutil.rmtree(self._weights, ignore_errors=True)

    def _decoder(self, who: Who, most: int | None) -> Decoder:
        return Decoder(self.servers[who], eos_ids(self._models[who], self._tokenizer), most)

    def _check_config(self) -> None:
        spec, method = self._config.rollout.vllm, self._config.method["name"]
        if self._method.self_teacher is not None and "teacher" in self._needed:
            raise ConfigError(
                f"method={method} lets a copy of the student write, which has no server; use rollout=builtin"
            )
        if Source.MONITORED in self._method.uses() and not isinstance(self._method, MonitoredMethod):
            raise ConfigError(f"method={method} has a writer of its own; use rollout=builtin")
        if self._config.rollout.schedule != "plain":
            raise ConfigError(
                f"rollout.schedule={self._config.rollout.schedule} decides which row decodes next, and a server decides that "
                "itself; use rollout.schedule=plain, or rollout=builtin"
            )
        own = [who for who in self._needed if getattr(spec, who).url is None]
        if own and world_size() > 1 and spec.start_s >= self._config.comm.timeout_s:
            raise ConfigError(
                f"rollout.vllm.start_s={spec.start_s:g} must be below comm.timeout_s={self._config.comm.timeout_s:g}, as the other "
                "ranks wait for the servers to start"
            )

    def _start(self, student_folder: str | None) -> None:
        """Start the servers of the run's own that are not there yet. Returns at once."""
        folders = {"student": student_folder, "teacher": self._config.model.teacher.path}
        for who in self._needed:
            if who not in self._own and getattr(self._config.rollout.vllm, who).url is None:
                folder = folders[who]
                assert folder is not None
                self._own[who] = self._own_server(who, folder)

    def _own_server(self, who: Who, folder: str) -> OwnServer:
        spec = self._config.rollout.vllm
        mine: ServerSpec = getattr(spec, who)
        log = self._logs / f"{who}.log"
        say(f"starting a vLLM server for the {who} (log: {log})")
        words = command(
            spec.python or sys.executable,
            folder,
            who,
            dtype=self._config.engine.dtype if who == "student" else self._config.model.teacher_dtype,
            context=self._config.train.max_length + 1,
            top_k=self._top_k,
            arguments=mine.arguments,
        )
        variables = dict(entry.split("=", 1) for entry in mine.environment)
        return OwnServer(who, words, variables, log, updatable=who == "student")

    def _connect(self) -> None:
        """Wait for all servers, check them on rank 0, and make them known to every rank."""
        found: dict[Who, tuple[str, str, bool]] = {}
        with all_or_nothing(ServerError):
            if rank() == 0:
                deadline = time.monotonic() + self._config.rollout.vllm.start_s
                for own in self._own.values():
                    own.wait(deadline)
                for who, server in self.servers.items():
                    server.http = self._http(who, self._address(who))
                    named = self._config.model.teacher.path if who == "teacher" and who not in self._own else None
                    say(check_server(server, self._config.train.max_length, self._top_k, named))
                    found[who] = server.http.address, server.name, server.cached_scoring
        for who, (address, name, cached) in from_rank_0(found).items():
            server = self.servers[who]
            server.http, server.name, server.cached_scoring = self._http(who, address), name, cached
        self._connected = True

    def _address(self, who: Who) -> str:
        return getattr(self._config.rollout.vllm, who).url or self._own[who].address

    def _http(self, who: Who, address: str) -> Http:
        spec, own = self._config.rollout.vllm, self._own.get(who)
        gone = None if own is None else own.gone
        name = f"the {who}'s vLLM server"
        return Http(name, address.rstrip("/"), request_s=spec.request_s, retry_s=spec.retry_s, gone=gone)


def needed_servers(method: Method) -> list[Who]:
    """Whose text a method trains on."""
    uses = method.uses()
    needed: list[Who] = []
    if method.probe_rollouts or not uses.isdisjoint(BY_STUDENT):
        needed.append("student")
    if not uses.isdisjoint((Source.TEACHER, Source.MONITORED)):
        needed.append("teacher")
    return needed
