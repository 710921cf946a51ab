"""Whether a server serves what a run needs, before anything is generated: model, context, vocabulary, log-probabilities."""

from __future__ import annotations

import math

from distill.endpoints import explain, other_weights
from distill.errors import ServerError
from distill.rollouts.vllm.client import Server

_SLACK = 1e-3
"""Probabilities may add up to a little more than 1, by rounding."""


def check_server(server: Server, context: int, top_k: int, path: str | None = None) -> str:
    """Learn the served name; returns a line about the server. Raises ServerError naming what does not fit, and the remedy.

    ``context``: tokens of the longest text; scoring it generates one more. ``top_k``: log-probabilities per position. ``path``:
    of the teacher's weights, as the run names them; a server that names others is told of.
    """
    status, answer = server.http.ask("GET", "/v1/models")
    if status != 200 or not answer.get("data"):
        raise ServerError(f"{server.http.name} at {server.http.address} serves no model: {explain(answer)}")
    model = answer["data"][0]
    server.name, length = model["id"], model.get("max_model_len")
    if length is not None and length < context + 1:
        raise ServerError(
            f"{server.http.name} at {server.http.address} has a context of {length} tokens, and this run needs {context + 1} "
            f"(train.max_length + 1); start it with --max-model-len={context + 1} or more, or set train.max_length={length - 1}"
        )
    _check_vocabulary(server)
    _check_logprobs(server, top_k)
    _check_cached_scoring(server)
    how = "reads its cache" if server.cached_scoring else "computes every prefix anew"
    doubt = other_weights(model.get("root"), path)
    told = f"{server.http.name} at {server.http.address}: {model.get('root')}, context {length}; scoring {how}"
    return f"{told}. Mind that {doubt}" if doubt else told


def _check_vocabulary(server: Server) -> None:
    last = server.vocabulary - 1
    for token, served in ((last, True), (last + 1, False)):
        body = {
            "model": server.name,
            "prompt": [token],
            "max_tokens": 1,
            "temperature": 0.0,
            "add_special_tokens": False,
        }
        status, answer = server.http.ask("POST", "/v1/completions", body)
        if (status == 200) is not served:
            more = "smaller" if served else "larger"
            raise ServerError(
                f"{server.http.name} at {server.http.address} serves a model with a {more} vocabulary than the {server.vocabulary} "
                f"tokens of model.{server.who}.path ({explain(answer) if served else 'it knows more tokens'}); serve that model"
            )


def _check_logprobs(server: Server, top_k: int) -> None:
    """They must be there in number, and be those of the whole distribution, unscaled."""
    body = {
        "model": server.name,
        "prompt": [0],
        "max_tokens": 1,
        "temperature": 0.5,
        "top_k": 1,
        "seed": 0,
        "logprobs": min(top_k, server.vocabulary),
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
    }
    status, answer = server.http.ask("POST", "/v1/completions", body)
    if status != 200:
        raise ServerError(
            f"{server.http.name} at {server.http.address} gives no {top_k} log-probabilities per token ({explain(answer)}); start "
            f"it with --max-logprobs={top_k} or more, or lower method.top_k"
        )
    values = list(answer["choices"][0]["logprobs"]["top_logprobs"][0].values())
    total = sum(map(math.exp, values)) if max(values) <= 0 else math.inf
    # Among the processed ones only the one token that top_k = 1 leaves has a probability, and that is 1.
    if total > 1 + _SLACK or (len(values) > 1 and max(values) == 0.0):
        raise ServerError(
            f"{server.http.name} at {server.http.address} returns scores that are not the model's own log-probabilities; start "
            "it with --logprobs-mode=raw_logprobs"
        )


def _check_cached_scoring(server: Server) -> None:
    """Use the cache in scoring where the server offers what that needs."""
    if not server.cached_scoring:
        return
    sampling = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
    body = {"model": server.name, "token_ids": [0], "sampling_params": sampling}
    status, answer = server.http.ask("POST", "/inference/v1/generate", body, patient=False)
    details = (answer["usage"].get("prompt_tokens_details") or {}) if status == 200 else {}
    server.cached_scoring = details.get("cached_tokens") is not None
