"""One model behind a vLLM server: generate from token ids, score token ids, look at the next token.

    server = Server("student", vocabulary=151936)
    server.http = Http("the student's server", "http://127.0.0.1:8000", request_s=600, retry_s=60)
    server.generate(ids, limit=64, seed=7, params=SamplingParams(stop=("\\n",)), eos=[2])   # → Generated
    server.score(ids, start=120, top_k=20)       # → Scores: log p of ids[120:], and the top 20 that may follow ids
    server.peek(ids, top_k=20)                   # → log-probabilities of the top 20 that may follow

All log-probabilities are those of the model as it is, in nats: before temperature, top-p and top-k (vLLM's ``raw_logprobs``).

**What a rewind costs.** A request carries its whole prefix as token ids; blocks of it that the server has already computed come
from its prefix cache, so going back to any step and on from there computes only what is new. Scoring is the exception: vLLM
reads no cache where prompt log-probabilities are asked for, because cached positions have none. But `score` needs them from
``start`` on only. Where the server offers ``/inference/v1/generate`` (``--enable-scale-out``) and reports cached tokens
(``--enable-prompt-tokens-details``), the cache is read all the same, the positions that come from it are left alone, and those
wanted are checked: the server must have computed each, and name the token that stands there. Where the cache reached beyond
``start`` the request is repeated without it (``Traffic.repeated``).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distill.endpoints import explain
from distill.errors import ServerError
from distill.rollouts.sampling import SamplingParams
from distill.rollouts.vllm.http import Http

_SEED = (1 << 63) - 1  # vLLM takes signed 64-bit seeds
_FORBID = -100.0  # added to a logit; vLLM's least


@dataclass(frozen=True, slots=True)
class Generated:
    """What was sampled: ids with everything that ended them, log-probabilities, and vLLM's reason."""

    ids: list[int]
    logprobs: list[float]
    reason: str


@dataclass(frozen=True, slots=True)
class Scores:
    """``logprobs`` of the tokens asked for, and the log-probabilities of the most likely ones to follow, descending."""

    logprobs: list[float]
    following: list[float]


@dataclass(slots=True)
class Traffic:
    """What a server has been asked: prompt tokens sent, how many of them its prefix cache held, scores asked twice."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    repeated: int = 0

    @property
    def cached_share(self) -> float:
        """Share of the prompt tokens that the server did not have to compute."""
        return self.cached_tokens / max(self.prompt_tokens, 1)


class Server:
    """Safe to use from many threads, once ``http`` is set. ``vocabulary`` is the model's; `checks` finds out the other two:
    the ``name`` under which it is served, and whether ``cached_scoring`` works.
    """

    http: Http

    def __init__(self, who: str, vocabulary: int, cached_scoring: bool = True) -> None:
        self.who, self.vocabulary, self.cached_scoring, self.name = who, vocabulary, cached_scoring, who
        self.traffic = Traffic()
        self._lock = threading.Lock()

    def generate(
        self,
        ids: Sequence[int],
        limit: int,
        seed: int,
        params: SamplingParams,
        eos: Sequence[int],
        most: int | None = None,
    ) -> Generated:
        """At most ``limit`` tokens after ``ids``; ``most``: only token ids below it are drawn. Raises ServerError."""
        body = self._body(ids) | {
            "max_tokens": limit,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": seed & _SEED,
            "stop": list(params.stop),
            "stop_token_ids": list(eos),
            "include_stop_str_in_output": True,
        }
        if most is not None and most < self.vocabulary:
            body["logit_bias"] = {str(token): _FORBID for token in range(most, self.vocabulary)}
        choice = self._choice(self._post("/v1/completions", body))
        logprobs = choice["logprobs"]["token_logprobs"]
        found = choice["token_ids"]
        if not found or len(logprobs) != len(found):
            raise ServerError(f"{self.http.name}: {len(found)} tokens came with {len(logprobs)} log-probabilities")
        reason = str(choice["finish_reason"]) + (f" at {choice['stop_reason']!r}" if choice["stop_reason"] else "")
        return Generated(found, logprobs, reason)

    def peek(self, ids: Sequence[int], top_k: int) -> list[float]:
        """Log-probabilities of the ``top_k`` most likely tokens after ``ids``, descending (fewer in a smaller vocabulary)."""
        body = self._body(ids) | {"max_tokens": 1, "temperature": 0.0, "logprobs": self._top(top_k)}
        choice = self._choice(self._post("/v1/completions", body))
        return _top(choice["logprobs"]["top_logprobs"][0].values(), top_k)

    def score(self, ids: Sequence[int], start: int, top_k: int) -> Scores:
        """Log-probability of each of ``ids[start:]`` after what precedes it (``start`` ≥ 1), and what may follow all of them."""
        if self.cached_scoring:
            scores = self._score_from_cache(ids, start, top_k)
            if scores is not None:
                return scores
            with self._lock:
                self.traffic.repeated += 1
        body = self._body(ids) | {
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": self._top(top_k),
            "prompt_logprobs": 0,
        }
        choice = self._choice(self._post("/v1/completions", body))
        logprobs = self._of_tokens(ids, start, choice["prompt_logprobs"])
        if logprobs is None:
            raise ServerError(
                f"{self.http.name} did not return the log-probabilities of all the tokens that it was sent"
            )
        return Scores(logprobs, _top(choice["logprobs"]["top_logprobs"][0].values(), top_k))

    def top(self, ids: Sequence[int], start: int, top_k: int) -> list[dict[int, float]]:
        """For each of ``ids[start:]``: the ``top_k`` most likely tokens in its place, id → log-probability."""
        body = self._body(ids) | {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": self._top(top_k)}
        found = self._choice(self._post("/v1/completions", body))["prompt_logprobs"]
        rows: list[dict[int, float]] = []
        for position in range(start, len(ids)):
            row = sorted(((int(t), v["logprob"]) for t, v in found[position].items()), key=lambda item: -item[1])
            rows.append(dict(row[: self._top(top_k)]))  # the token itself comes too where it is not among them
        return rows

    def _score_from_cache(self, ids: Sequence[int], start: int, top_k: int) -> Scores | None:
        """None where a wanted position was not computed for this request, or what came from the cache has no JSON."""
        sampling = {
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": self._top(top_k),
            "prompt_logprobs": 0,
            "detokenize": False,
            "skip_reading_prefix_cache": False,
        }
        body = {"model": self.name, "token_ids": list(ids), "sampling_params": sampling}
        status, answer = self.http.ask("POST", "/inference/v1/generate", body, patient=False)
        if status != 200:  # cached positions hold anything, even no number; any other reason shows in the next request
            return None
        choice = self._choice(self._checked(status, answer))
        details = answer["usage"].get("prompt_tokens_details") or {}
        from_cache = details.get("cached_tokens")
        if from_cache is None:
            raise ServerError(
                f"{self.http.name} does not say how many tokens came from its cache; start it with "
                "--enable-prompt-tokens-details, or set rollout.vllm.cached_scoring=false"
            )
        # The hidden state of token i gives the probability of token i + 1: of the first one computed on.
        if start <= from_cache:
            return None
        logprobs = self._of_tokens(ids, start, answer["prompt_logprobs"])
        if logprobs is None:
            return None
        return Scores(logprobs, _top((t["logprob"] for t in choice["logprobs"]["content"][0]["top_logprobs"]), top_k))

    def _of_tokens(self, ids: Sequence[int], start: int, found: Sequence[dict[str, Any] | None]) -> list[float] | None:
        """What ``found`` says of ``ids[start:]``; None where it does not speak of exactly these tokens.

        Aligned at the end: a server may leave out what came from its cache. The first token of a prompt has none.
        """
        wanted = len(ids) - start
        rows = list(found[len(found) - wanted :]) if wanted <= len(found) else []
        if len(rows) < wanted:
            return None
        logprobs = []
        for token, row in zip(ids[start:], rows, strict=True):
            entry = (row or {}).get(str(token))
            if entry is None:
                return None
            logprobs.append(float(entry["logprob"]))
        return logprobs

    def _body(self, ids: Sequence[int]) -> dict[str, Any]:
        """What all requests share. Penalties are named, as a server may have other defaults from the model's folder."""
        return {
            "model": self.name,
            "prompt": list(ids),
            "add_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": 0,
        }

    def _top(self, top_k: int) -> int:
        return min(top_k, self.vocabulary)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._checked(*self.http.ask("POST", path, body))

    def _checked(self, status: int, answer: Any) -> Any:
        """The answer, counted. Raises ServerError for a request that the server refuses."""
        if status != 200:
            raise ServerError(f"{self.http.name} at {self.http.address} refuses a request: {explain(answer)}")
        usage = answer["usage"]
        with self._lock:
            self.traffic.requests += 1
            self.traffic.prompt_tokens += usage["prompt_tokens"]
            self.traffic.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return answer

    def _choice(self, answer: Any) -> Any:
        choice = answer["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerError(
                f"{self.http.name} broke a request off ({choice['finish_reason']}); look at its log and run the same command again"
            )
        return choice


def _top(logprobs: Any, top_k: int) -> list[float]:
    """The ``top_k`` largest: vLLM adds the token itself where it is not among them."""
    return sorted(map(float, logprobs), reverse=True)[:top_k]
