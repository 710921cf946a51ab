"""One server that is asked with patience: what does not answer is asked again, until that has taken too long.

    http = Http("the teacher's vLLM server", "http://127.0.0.1:8000", request_s=600.0, retry_s=60.0)
    status, answer = http.ask("POST", "/v1/completions", {"prompt": [1, 2, 3]})

A server that does not answer is asked again with growing pauses until ``retry_s`` have passed; then, or where its own process is
known to have ended, ServerError names it. Every wait has a deadline: ``request_s`` for one answer. Addresses and connections:
``distill.endpoints``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from distill.endpoints import Backoff, Endpoint, NoReply, explain, key_from
from distill.errors import ServerError

_TRANSIENT = {429, 500, 502, 503, 504}
_LONGEST_PAUSE_S = 8.0

Answer = tuple[int, Any]


class Http:
    """``gone`` tells why a server that this process started has ended, or None while it runs."""

    def __init__(
        self, name: str, address: str, *, request_s: float, retry_s: float, gone: Callable[[], str | None] | None = None
    ) -> None:
        self.name, self.address, self._request_s, self._retry_s = name, address, request_s, retry_s
        self._gone = gone or (lambda: None)
        self._endpoint = Endpoint(address, request_s=request_s, key=key_from(None), name=name)

    def ask(self, method: str, path: str, body: Any = None, *, patient: bool = True) -> Answer:
        """(status, answer) of one request; the answer is parsed JSON, or text where it is none.

        With ``patient=False`` an answer of status 500 is returned, not retried. Raises ServerError for a server that cannot be
        reached, refuses the key, or takes longer than ``request_s``.
        """
        data = None if body is None else json.dumps(body).encode()
        began, attempt, backoff = time.monotonic(), 0, Backoff(_LONGEST_PAUSE_S)
        while True:
            problem, answer, asked_s = self._try(method, path, data)
            if answer is not None and (answer[0] not in _TRANSIENT or (answer[0] == 500 and not patient)):
                return self._authorised(answer)
            ended = self._gone()
            if ended is not None:
                raise ServerError(f"{self.name} has ended: {ended}")
            pause = backoff.pause(asked_s)
            if time.monotonic() - began + pause > self._retry_s and attempt:
                raise ServerError(
                    f"{self.name} at {self.address} does not answer {path} ({problem}; {attempt + 1} tries in "
                    f"{time.monotonic() - began:.0f} s, rollout.vllm.retry_s={self._retry_s:g}). Start it again, look at its "
                    "log, and run the same command once more"
                )
            time.sleep(pause)
            attempt += 1

    def _try(self, method: str, path: str, data: bytes | None) -> tuple[str, Answer | None, float | None]:
        """What went wrong, the answer where there is one, and the seconds that it asks to wait."""
        try:
            reply = self._endpoint.once(method, path, data)
        except NoReply as error:
            if error.late and error.reached and self._gone() is None:
                raise ServerError(
                    f"{self.name} at {self.address} gave no answer to {path} within {self._request_s:g} s; raise "
                    "rollout.vllm.request_s, or lower rollout.slots or rollout.max_new_tokens"
                ) from None
            return str(error), None, None
        return f"status {reply.status}: {explain(reply.answer)}", (reply.status, reply.answer), reply.wait_s

    def _authorised(self, answer: Answer) -> Answer:
        if answer[0] == 401:
            raise ServerError(
                f"{self.name} at {self.address} refuses this request ({explain(answer[1])}); set VLLM_API_KEY to its --api-key"
            )
        return answer
