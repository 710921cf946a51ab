"""A stand-in for a vLLM server: the part of its protocol that is used, computed by a Hugging Face forward; and its ways to fail.

Positions that a prefix cache would hold come back as what earlier requests left there, as vLLM's do: the right tokens may stand
beside wrong numbers.

``faults`` are done to the next completions, one each, before anything is answered right; ``spoil`` changes every answer to a
completion, for servers that are wrong in some way all the time. ``down`` and ``up`` end and begin it at one address.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

BLOCK = 4


class VllmStub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(
        self, model: Any, context: int = 1000, max_logprobs: int = 20, tokenizer: Any = None, port: int = 0
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.context, self.max_logprobs, self.tokenizer = model, context, max_logprobs, tokenizer
        self.names = ["stub"]  # of the models that it serves
        self.faults: list[Callable[[Handler, dict[str, Any]], None]] = []
        self.spoil: Callable[[dict[str, Any], dict[str, Any]], None] = lambda request, answer: None
        self.sockets: set[socket.socket] = set()
        self.key: str | None = None
        self.processed = False  # logprobs_mode
        self.failures: list[int] = []  # statuses to answer with first
        self.spoilt = False  # what the cache left is no number
        self.delay_s = 0.0
        self.stop_after: int | None = None  # end every text here, for no reason
        self.cached: set[tuple[int, ...]] = set()
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> VllmStub:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def down(self) -> None:
        """Nobody listens any more, and open connections end."""
        self.__exit__()
        for each in list(self.sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def up(self) -> VllmStub:
        """Another one at the same address, with all that was set."""
        again = VllmStub(self.model, self.context, self.max_logprobs, self.tokenizer, self.server_address[1])
        for name in ("key", "names", "faults", "spoil", "sent", "delay_s"):
            setattr(again, name, getattr(self, name))
        return again

    @torch.no_grad()
    def rows(self, ids: list[int]) -> torch.Tensor:
        with self.lock:  # one forward at a time: tests use one thread
            return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)

    def cache(self, ids: list[int], read: bool) -> int:
        """Tokens of ``ids`` that come from the cache, whole blocks, never all of them; then holds what was sent."""
        blocks = [tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK)]
        found = max((len(b) for b in blocks if b in self.cached and len(b) < len(ids)), default=0) if read else 0
        self.cached.update(blocks)
        return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: VllmStub

    def handle(self) -> None:
        self.server.sockets.add(self.connection)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that did not wait
            super().handle()
        self.server.sockets.discard(self.connection)

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        length, root = self.server.context, "/models/stub"
        self.reply(200, {"data": [{"id": name, "max_model_len": length, "root": root} for name in self.server.names]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        self.server.sent.append((self.path, body))
        time.sleep(self.server.delay_s)
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            return self.reply(401, {"error": "Unauthorized"})
        if self.server.failures:
            return self.reply(self.server.failures.pop(0), {"error": {"message": "not now"}})
        if self.path == "/v1/completions":
            if self.server.faults:
                return self.server.faults.pop(0)(self, body)
            return self.reply(*self.completion(body))
        return self.reply(*self.tokens(body))

    def reply(self, status: int, answer: Any, **headers: str) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def completion(self, body: dict[str, Any]) -> tuple[int, Any]:
        server, ids = self.server, body["prompt"]
        if body["model"] not in server.names:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if len(ids) + body["max_tokens"] > server.context:
            return 400, {"error": {"message": f"This model's maximum context length is {server.context} tokens."}}
        if max(ids) >= server.model.config.vocab_size:
            return 400, {"error": {"message": "Token id is out of vocabulary"}}
        if max(body.get("logprobs", 0), body.get("prompt_logprobs") or 0) > server.max_logprobs:
            return 400, {"error": {"message": f"Requested logprobs greater than max allowed: {server.max_logprobs}"}}
        cached = server.cache(ids, read="prompt_logprobs" not in body)
        found, logprobs, tops = self.decode(body, ids)
        choice: dict[str, Any] = {
            "token_ids": found,
            "finish_reason": "length" if len(found) == body["max_tokens"] else "stop",
            "stop_reason": None,
            "logprobs": {"token_logprobs": logprobs, "top_logprobs": [named(top) for top in tops]},
        }
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = self.prompt(ids, body["prompt_logprobs"], 0)
        answer = {"model": body["model"], "choices": [choice], "usage": usage(ids, cached)}
        server.spoil(body, answer)
        return 200, answer

    def tokens(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids, sampling = body["token_ids"], body["sampling_params"]
        if self.server.spoilt:
            return 400, {"error": {"message": "Out of range float values are not JSON compliant"}}
        cached = self.server.cache(
            ids, read=not sampling.get("skip_reading_prefix_cache", "prompt_logprobs" in sampling)
        )
        top = self.server.rows(ids)[-1].topk(max(sampling.get("logprobs", 0), 1)).values.tolist()
        content = [{"top_logprobs": [{"logprob": value} for value in top]}]
        choice = {"finish_reason": "length", "token_ids": [0], "logprobs": {"content": content}}
        wanted = self.prompt(ids, 0, cached) if "prompt_logprobs" in sampling else None
        return 200, {"choices": [choice], "usage": usage(ids, cached), "prompt_logprobs": wanted}

    def prompt(self, ids: list[int], k: int, cached: int) -> list[Any]:
        rows = self.server.rows(ids)
        found: list[Any] = [None]
        for position in range(1, len(ids)):
            row, token = rows[position - 1], ids[position]
            entries = {token: float(row[token])} | dict(zip(*(v.tolist() for v in reversed(row.topk(k)))))
            if position - 1 < cached:
                entries = {token: 12.5}  # stale
            found.append({str(t): {"logprob": value} | self.spelled(t) for t, value in entries.items()})
        return found

    def spelled(self, token: int) -> dict[str, str]:
        tokenizer = self.server.tokenizer
        return {} if tokenizer is None else {"decoded_token": tokenizer.decode([token])}

    def decode(self, body: dict[str, Any], ids: list[int]) -> tuple[list[int], list[float], list[dict[int, float]]]:
        """Greedy, whatever temperature: end tokens and the words of stop strings end it."""
        ends = {*body.get("stop_token_ids", []), *(int(word[1:]) for word in body.get("stop", []))}
        found: list[int] = []
        logprobs, tops = [], []
        while (
            len(found) < body["max_tokens"]
            and not (found and found[-1] in ends)
            and len(found) != self.server.stop_after
        ):
            row = self.server.rows(ids + found)[-1]
            biased = row.clone()
            for token, bias in body.get("logit_bias", {}).items():
                biased[int(token)] += bias
            found.append(int(biased.argmax()))
            k = max(body.get("logprobs", 0), 1)
            values, tokens = row.topk(k)
            tops.append(dict(zip(tokens.tolist(), values.tolist())))
            logprobs.append(float(row[found[-1]]))
            if self.server.processed and body.get("top_k") == 1:
                tops[-1] = {token: 0.0 if n == 0 else -9999.0 for n, token in enumerate(tops[-1])}
        return found, logprobs, tops


def named(top: dict[int, float]) -> dict[str, float]:
    return {f"token_id:{token}": value for token, value in top.items()}


def usage(ids: list[int], cached: int) -> dict[str, Any]:
    return {"prompt_tokens": len(ids), "prompt_tokens_details": {"cached_tokens": cached}}
