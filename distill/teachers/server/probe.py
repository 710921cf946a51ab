"""Whether a server says what a run needs: asked before anything is trained, and in short again after each failure.

    facts = examine(endpoint, need)          # model, context, fingerprint; ServerError names what does not fit, and the remedy
    recheck(endpoint, facts, need)           # is it still (or again) that model?

The probe is one fixed text of token ids from all over the vocabulary. Its log-probabilities are the fingerprint of a model: two
servers that share the work, or one that comes back after a failure, must give the same ones to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.endpoints import Endpoint, NoReply, Reply, explain, other_weights
from distill.errors import ServerError
from distill.seeds import mix
from distill.teachers.server.question import PATH, Answer, BadAnswer, Question
from distill.wire import travels

PROBE = 52  # purpose of the tokens of the probe
_TOKENS = 64
_SLACK = 1e-3  # probabilities may add up to a little more than 1, by rounding
_SAME = 0.15  # mean distance in nats of one model's log-probabilities in batches of another shape, in bf16
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


class NotNow(Exception):
    """The server gave no answer that could be judged; it may do so later."""


@dataclass(frozen=True, slots=True)
class Need:
    """What the run asks of its teacher. ``exact``: ``vocabulary`` is the teacher's own, not only a lower bound of it."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    exact: bool
    context: int  # tokens of the longest text; scoring generates one more
    kind: str
    top_k: int
    model: str | None = None
    key_variable: str = "VLLM_API_KEY"
    path: str | None = None  # of the teacher's weights, as the run names them

    @property
    def wanted(self) -> int:
        """Log-probabilities per token that are asked for."""
        return self.vocabulary if self.kind == "logits" else min(self.top_k, self.vocabulary)

    def probe(self) -> list[int]:
        """The probe's token ids: below the tokenizer's size, which every model of its family knows."""
        most = min(self.vocabulary, len(self.tokenizer))
        return [mix(PROBE, place) % most for place in range(min(_TOKENS, self.context))]


@travels
@dataclass(frozen=True, slots=True)
class Facts:
    """What the first server was found to be. ``tempered``: its prompt log-probabilities follow the sampling temperature.
    ``doubt``: it says that it loaded other weights than those that the run names."""

    model: str
    context: int | None
    tempered: bool
    fingerprint: tuple[float, ...]
    doubt: str | None = None


def examine(endpoint: Endpoint, need: Need, facts: Facts | None = None) -> Facts:
    """Everything that can be seen from outside; ``facts`` of another server must agree. Raises NotNow, and ServerError."""
    model, context, doubt = _model(endpoint, need)
    question = Question(need.kind, need.wanted, model)
    _check_vocabulary(endpoint, need, question)
    probe = need.probe()
    reply = _ask(endpoint, question, probe)
    if reply.status != 200:
        _refused(endpoint, need, question, reply)
    fingerprint = _judged(endpoint, need, question, reply, facts)
    _check_tokens(endpoint, need, reply)
    tempered = _tempered(endpoint, need, question, fingerprint)
    _check_length(endpoint, need, question)
    return Facts(model, context, tempered, fingerprint, doubt)


def recheck(endpoint: Endpoint, need: Need, facts: Facts) -> None:
    """That ``endpoint`` answers, as the model that ``facts`` tells of. Raises NotNow, and ServerError for another model."""
    question = Question(need.kind, need.wanted, facts.model)
    reply = _ask(endpoint, question, need.probe())
    if reply.status != 200:
        _refused(endpoint, need, question, reply)
    _judged(endpoint, need, question, reply, facts)


def refusal(endpoint: Endpoint, reply: Reply, need: Need, what: str) -> ServerError:
    """The error for a request that the server does not take, and no repetition would change."""
    said = explain(reply.answer)
    if reply.status in (401, 403):
        remedy = f"set {need.key_variable} in the environment to its key"
    elif reply.status == 404:
        remedy = "does it serve this model under this name (teacher.server.model), and is its address without a path of its own?"
    elif "context" in said or "max_model_len" in said or "length" in said:
        remedy = "start it with a larger --max-model-len, or lower train.max_length"
    else:
        remedy = "its log may say more; the same command continues once it takes such requests"
    return ServerError(
        f"the teacher's server at {endpoint.address} refuses {what} (status {reply.status}: {said}); {remedy}"
    )


def _model(endpoint: Endpoint, need: Need) -> tuple[str, int | None, str | None]:
    """(served name, context, why it may be another one) of the model that the run means."""
    reply = _once(endpoint, "GET", "/v1/models")
    if reply.status != 200:
        raise refusal(endpoint, reply, need, "GET /v1/models")
    served = {str(m.get("id")): m for m in _list(reply.answer) if isinstance(m, dict)}
    names = ", ".join(served) or "no model"
    if not served or (need.model is not None and need.model not in served):
        raise ServerError(
            f"the teacher's server at {endpoint.address} serves {names}, not '{need.model or 'a model'}'; set "
            "teacher.server.model to a name that it serves, or its --served-model-name"
        )
    if need.model is None and len(served) > 1:
        raise ServerError(
            f"the teacher's server at {endpoint.address} serves {names}; set teacher.server.model to one of them"
        )
    model = need.model or next(iter(served))
    length = served[model].get("max_model_len")
    if isinstance(length, int) and length < need.context + 1:
        raise ServerError(
            f"the teacher's server at {endpoint.address} has a context of {length} tokens, and this run needs {need.context + 1}, "
            f"train.max_length and one; start it with --max-model-len={need.context + 1} or more, or set "
            f"train.max_length={length - 1}"
        )
    doubt = other_weights(served[model].get("root"), need.path)
    return (
        model,
        length if isinstance(length, int) else None,
        doubt and f"the teacher's server at {endpoint.address}: {doubt}",
    )


def _list(answer: Any) -> list[Any]:
    data = answer.get("data") if isinstance(answer, dict) else None
    return data if isinstance(data, list) else []


def _check_vocabulary(endpoint: Endpoint, need: Need, question: Question) -> None:
    """The last id is known, and, where the teacher's size is known, the one behind it is not."""
    plain = Question("sampled", 0, question.model)
    for token, known in ((need.vocabulary - 1, True), (need.vocabulary, False)):
        if not need.exact and (not known or need.vocabulary > len(need.tokenizer)):
            continue  # padding of the student's alone
        reply = _ask(endpoint, plain, [token])
        if (reply.status == 200) is not known and (known or need.exact):
            if known and reply.status != 400:
                raise refusal(endpoint, reply, need, f"a prompt of the token {token}")
            size, why = ("smaller", explain(reply.answer)) if known else ("larger", "it knows more tokens")
            raise ServerError(
                f"the teacher's server at {endpoint.address} serves a model with a {size} vocabulary than the {need.vocabulary} "
                f"tokens of {'model.teacher.path' if need.exact else 'the student'} ({why}); serve the teacher that this run names"
            )


def _refused(endpoint: Endpoint, need: Need, question: Question, reply: Reply) -> None:
    """Why the probe was refused: too many log-probabilities, or any at all."""
    if reply.status in (401, 403, 404) or question.wanted == 0:
        raise refusal(endpoint, reply, need, "a request with prompt_logprobs")
    fewer = _ask(endpoint, Question("sampled", 0, question.model), need.probe())
    if fewer.status != 200:
        raise refusal(endpoint, reply, need, "a request with prompt_logprobs")
    remedy = "teacher.top_k" if need.kind == "topk" else "use teacher.signal=topk"
    raise ServerError(
        f"the teacher's server at {endpoint.address} gives no {question.wanted} log-probabilities per token "
        f"({explain(reply.answer)}); start it with --max-logprobs={question.wanted} or more, or "
        f"{'lower ' if need.kind == 'topk' else ''}{remedy}"
    )


def _judged(endpoint: Endpoint, need: Need, question: Question, reply: Reply, facts: Facts | None) -> tuple[float, ...]:
    """The fingerprint in an answer to the probe. Raises ServerError for one that no training should start from."""
    probe = need.probe()
    places = range(1, len(probe))
    try:
        answer = question.read(reply, probe, places)
        mine = Question("sampled", 0, question.model).read(reply, probe, places)
    except BadAnswer as error:
        raise ServerError(
            f"the teacher's server at {endpoint.address} does not return the prompt's log-probabilities as vLLM's prompt_logprobs "
            f"has them: {error}; it must score token ids as they are sent, none left out"
        ) from None
    _check_sums(endpoint, answer)
    fingerprint = tuple(float(value) for value in mine.logprobs)
    if facts is not None and not same(fingerprint, facts.fingerprint):
        raise ServerError(
            f"the teacher's server at {endpoint.address} answers with another model than this run began with: log-probabilities "
            f"of a probe differ by {_distance(fingerprint, facts.fingerprint):.3g} nats on average; serve the same weights there"
        )
    return fingerprint


def _check_sums(endpoint: Endpoint, answer: Answer) -> None:
    """Log-probabilities are at most 0, and what they stand for adds up to at most 1."""
    rows = answer.logprobs.astype("float64").reshape(len(answer.logprobs), -1)
    if rows.size and (rows.max() > 0 or any(math.fsum(map(math.exp, row)) > 1 + _SLACK for row in rows)):
        raise ServerError(
            f"the teacher's server at {endpoint.address} returns scores that are not log-probabilities under the whole "
            "vocabulary; start it with --logprobs-mode=raw_logprobs"
        )


def _check_tokens(endpoint: Endpoint, need: Need, reply: Reply) -> None:
    """Ids mean the same text there as here, where the server tells what they mean."""
    said: dict[int, str] = {}
    for row in reply.answer["choices"][0]["prompt_logprobs"][1:]:
        for token, entry in row.items():
            text = entry.get("decoded_token")
            if isinstance(text, str) and "�" not in text and int(token) < len(need.tokenizer):
                said[int(token)] = text
    here = {token: str(need.tokenizer.decode([token])) for token in said}
    wrong = [token for token, text in said.items() if not _same_text(here[token], text)]
    if len(wrong) > max(1, len(said) // 50):
        examples = ", ".join(f"{t} is {said[t]!r} there and {here[t]!r} here" for t in wrong[:2])
        raise ServerError(
            f"the teacher's server at {endpoint.address} has another tokenizer: of {len(said)} tokens {len(wrong)} differ "
            f"({examples}). Token-level distillation needs one tokenizer family; serve a teacher of the student's family"
        )


def _same_text(here: str, there: str) -> bool:
    """Spaces at the ends apart, which decoders of single tokens treat differently; special tokens may be left out."""
    return "�" in here or not there.strip() or not here.strip() or here.strip() == there.strip()


def _tempered(endpoint: Endpoint, need: Need, question: Question, fingerprint: Sequence[float]) -> bool:
    """Whether the same probe at another sampling temperature gives other numbers."""
    plain, probe = Question("sampled", 0, question.model), need.probe()
    reply = _ask(endpoint, plain, probe, temperature=0.5)
    if reply.status != 200:
        return False
    try:
        found = plain.read(reply, probe, range(1, len(probe)))
    except BadAnswer:
        return False
    return not same([float(value) for value in found.logprobs], fingerprint)


def _check_length(endpoint: Endpoint, need: Need, question: Question) -> None:
    """A text as long as the run's longest is scored whole."""
    ids = [mix(PROBE, place) % min(need.vocabulary, len(need.tokenizer)) for place in range(need.context)]
    plain = Question("sampled", 0, question.model)
    reply = _ask(endpoint, plain, ids)
    if reply.status != 200:
        raise refusal(endpoint, reply, need, f"a prompt of {len(ids)} tokens (train.max_length)")
    try:
        plain.read(reply, ids, range(1, len(ids)))
    except BadAnswer as error:
        raise ServerError(
            f"the teacher's server at {endpoint.address} does not score a text of {len(ids)} tokens (train.max_length) whole: "
            f"{error}; let it take longer prompts without truncation, or lower train.max_length"
        ) from None


def _ask(endpoint: Endpoint, question: Question, ids: Sequence[int], temperature: float = 1.0) -> Reply:
    return _once(endpoint, "POST", PATH, question.data(ids, temperature))


def _once(endpoint: Endpoint, method: str, path: str, data: bytes | None = None) -> Reply:
    """An answer that can be judged. Raises NotNow for none, and for those that another try may change."""
    try:
        reply = endpoint.once(method, path, data)
    except NoReply as error:
        raise NotNow(str(error)) from None
    if reply.status in _TRANSIENT:
        raise NotNow(f"status {reply.status}: {explain(reply.answer)}")
    if reply.status == 200 and not reply.is_json:
        raise NotNow(f"what came is no JSON ({str(reply.answer)[:60]!r} …)")
    return reply


def _distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / max(len(ours), 1)


def same(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two fingerprints are one model's."""
    return _distance(ours, theirs) <= _SAME
