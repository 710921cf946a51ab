"""The vLLM engine against a stand-in for the server: the same trajectories as the built-in engine, and every way a server can fail.

The real server is in tests/vllm.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.errors import ConfigError, ServerError
from distill.rollouts import Generator, SamplingParams
from distill.rollouts.monitored import Monitored, MonitorOptions
from distill.rollouts.vllm.checks import check_server
from distill.rollouts.vllm.client import Server
from distill.rollouts.vllm.generator import Decoder, VllmGenerator
from distill.rollouts.vllm.http import Http
from distill.rollouts.vllm.monitored import VllmMonitored

_spec = importlib.util.spec_from_file_location("vllm_stub", Path(__file__).with_name("vllm_stub.py"))
assert _spec is not None
assert _spec.loader is not None
vllm_stub = importlib.util.module_from_spec(_spec)
sys.modules["vllm_stub"] = vllm_stub
_spec.loader.exec_module(vllm_stub)
VllmStub = vllm_stub.VllmStub

pytestmark = pytest.mark.unit

EOS, SHARED = 0, 61
STEP_END = ["w7", "w11", "w23", "w42"]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    ids = {"<eos>": EOS, "<pad>": 1, "<bos>": 2, **{f"w{i}": i for i in range(3, SHARED)}}
    core = Tokenizer(models.WordLevel(ids, "<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")


@pytest.fixture
def student(tiny: Any) -> Any:
    return tiny(seed=1)


@pytest.fixture
def teacher(tiny: Any) -> Any:
    """Shaken weights of the student, and three more ids that nothing may be written with."""
    model, noise = tiny(seed=1), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn(weights.shape, generator=noise) * 0.05)
    torch.manual_seed(0)
    model.resize_token_embeddings(SHARED + 3, mean_resizing=False)
    with torch.no_grad():  # the teacher would like to write one of them
        model.get_output_embeddings().weight[-1] = 1.5 * model.get_output_embeddings().weight[30:50].mean(0)
    return model


def serve(stub: Any, who: str, vocabulary: int, **how: Any) -> Server:
    server = Server(who, vocabulary, how.pop("cached_scoring", True))
    server.http = Http(f"the {who}'s server", stub.url, **{"request_s": 20.0, "retry_s": 5.0} | how)
    server.name = "stub"
    return server


@pytest.fixture
def stub(student: Any) -> Iterator[Any]:
    with VllmStub(student) as server:
        yield server


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "three breaches": {"max_breaches": 3, "mask_flawed": True, "epsilon": 0.3},
    "skd": {
        "value": "student_ratio", "epsilon": 0.9, "theta": 0.0, "max_breaches": 0, "keep_flawed": False, "rewind": "step"
    },
    "no room": {"step_tokens": 20, "epsilon": 0.9, "theta": 0.0},
}  # fmt: skip


@pytest.mark.parametrize(("name", "cached"), [*((name, True) for name in VARIANTS), ("paper", False)])
def test_the_same_trajectories_as_the_built_in_engine(
    student: Any, teacher: Any, words: Any, name: str, cached: bool
) -> None:
    values: dict[str, Any] = {
        "epsilon": 0.1, "theta": 0.5, "delimiters": STEP_END, "step_tokens": 9, "marker": "w12 w13", "top_k": 10
    }  # fmt: skip
    options, context = MonitorOptions(**(values | VARIANTS[name])), 22 if name == "no room" else 60
    params = SamplingParams(max_new_tokens=40, temperature=0.0)
    prompts = [[3 + (5 * i + j) % 50 for j in range(1 + i % 6)] for i in range(10)]
    want = Monitored(student, teacher, words, options, params, context_length=context).generate(prompts, range(10))
    with VllmStub(student) as ours, VllmStub(teacher) as theirs:
        engine = VllmMonitored(
            Decoder(serve(ours, "student", SHARED), {EOS}, SHARED),
            Decoder(serve(theirs, "teacher", SHARED + 3, cached_scoring=cached), {EOS}, SHARED),
            words, options, params, slots=4, context_length=context,
        )  # fmt: skip
        got = engine.generate(prompts, range(10))
    for mine, theirs_ in zip(got, want, strict=True):
        assert (mine.ids, mine.accepted_ids, mine.supervised) == (theirs_.ids, theirs_.accepted_ids, theirs_.supervised)
        assert (mine.finish, mine.takeovers, mine.teacher_share) == (
            theirs_.finish,
            theirs_.takeovers,
            theirs_.teacher_share,
        )
        assert [(s.ids, s.breach) for s in mine.steps] == [(s.ids, s.breach) for s in theirs_.steps]
        figures = [[(s.value, s.boundary, s.entropy) for s in one.steps] for one in (mine, theirs_)]
        assert np.array(figures[0]) == pytest.approx(np.array(figures[1]), rel=1e-4)
    assert any(one.takeovers for one in want)
    assert any(not t.tokens for one in want for t in one.takeovers) == (name == "no room")
    usage = engine.usage
    assert usage.student_tokens == usage.judged_tokens == sum(one.notes["student_tokens"] for one in want)
    assert usage.teacher_tokens == sum(one.notes["teacher_tokens"] for one in want)
    traffic = engine.teacher.server.traffic
    if name == "three breaches" and cached:  # blocks of 4 tokens here: what a step re-reads is less than a block
        assert traffic.cached_tokens > 0.4 * traffic.prompt_tokens


def test_plain_rollouts_equal_the_built_in_ones(student: Any, stub: Any, words: Any) -> None:
    prompts = [[3 + (7 * i + j) % 50 for j in range(1 + i % 4)] for i in range(8)]
    decoder = Decoder(serve(stub, "student", SHARED), {EOS}, None)
    for stop in ((), ("w7", "w42")):
        params = SamplingParams(max_new_tokens=20, temperature=0.0, stop=stop)
        want = Generator(student, words, context_length=22).generate(prompts, params, range(8))
        got = VllmGenerator(decoder, words, slots=3, context_length=22).generate(prompts, params, range(8))
        for mine, theirs in zip(got, want, strict=True):
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
            assert (mine.response_ids, mine.finish, mine.stop_string) == (
                theirs.response_ids, theirs.finish, theirs.stop_string
            )  # fmt: skip
    with pytest.raises(ValueError, match="prompt 1 has 22 tokens"):
        VllmGenerator(decoder, words, slots=3, context_length=22).generate([[3], [4] * 22], params, [0, 1])


def test_what_comes_from_the_cache_is_never_taken_for_a_score(student: Any, stub: Any) -> None:
    server, rows = serve(stub, "student", SHARED), {}
    ids = [3 + (11 * i) % 50 for i in range(23)]
    for start in (1, 8, 9, 20, 21, 22):  # 20 of the 23 tokens are in the cache from the second request on
        rows[start] = server.score(ids, start, 5).logprobs
    whole = stub.rows(ids)
    want = [float(whole[position - 1][ids[position]]) for position in range(1, len(ids))]
    for start, found in rows.items():
        assert found == pytest.approx(want[start - 1 :], abs=1e-5)
    assert (
        server.traffic.repeated == 3
    )  # the first token behind the cache has no score either: its state was not computed
    stub.spoilt = True
    assert server.score(ids, 22, 5).logprobs == pytest.approx(want[21:], abs=1e-5)
    top = server.top(ids, 20, 3)
    assert [list(row) for row in top] == [stub.rows(ids)[p - 1].topk(3).indices.tolist() for p in range(20, 23)]


def test_randomness_follows_seed_and_position(stub: Any) -> None:
    decoder = Decoder(serve(stub, "student", SHARED), {EOS}, None)
    params = SamplingParams(max_new_tokens=5, temperature=0.7)
    for ids, seed in (([5, 6], 1), ([5, 6], 1), ([5, 6], 2), ([5, 6, 7], 1)):
        decoder.run(ids, 2, seed, params, None)
    seeds = [body["seed"] for _, body in stub.sent]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_a_server_that_comes_back_is_waited_for_and_one_that_does_not_is_named(stub: Any) -> None:
    server = serve(stub, "teacher", SHARED)
    stub.failures = [503, 500, 502]
    assert server.peek([5], 2) == pytest.approx(stub.rows([5])[-1].topk(2).values.tolist(), abs=1e-5)
    stub.shutdown()
    stub.server_close()
    began = time.monotonic()
    with pytest.raises(ServerError) as caught:
        serve(stub, "teacher", SHARED, retry_s=1.0).peek([5], 2)
    assert time.monotonic() - began < 10
    for words in (
        "the teacher's server at http://127.0.0.1:",
        "does not answer /v1/completions",
        "Connection",
        "retry_s=1",
    ):
        assert words in str(caught.value)
    ended = serve(stub, "teacher", SHARED, gone=lambda: "signal 9; out of memory")
    with pytest.raises(ServerError, match="has ended: signal 9; out of memory"):
        ended.peek([5], 2)


def test_one_failure_stops_the_batch(stub: Any, words: Any) -> None:
    server = serve(stub, "student", SHARED)
    stub.stop_after = 2
    generator = VllmGenerator(Decoder(server, {EOS}, None), words, slots=2, context_length=30)
    with pytest.raises(ServerError, match=r"ended a text after 2 of 9 tokens \(stop\).*neither an end token"):
        generator.generate([[5]] * 50, SamplingParams(max_new_tokens=9), range(50))
    assert len(stub.sent) < 10


def test_refusals_are_told_with_their_remedy(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.key = "secret"
    with pytest.raises(ServerError, match=r"refuses this request.*set VLLM_API_KEY"):
        serve(stub, "student", SHARED).peek([5], 2)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    serve(stub, "student", SHARED).peek([5], 2)
    with pytest.raises(ServerError, match="refuses a request: Token id is out of vocabulary"):
        serve(stub, "student", SHARED).peek([99], 2)
    stub.delay_s = 3.0
    with pytest.raises(
        ServerError, match=r"gave no answer to /v1/completions within 0\.5 s; raise rollout\.vllm\.request_s"
    ):
        serve(stub, "student", SHARED, request_s=0.5).peek([5], 2)
    with pytest.raises(ConfigError, match="'localhost:8000': not an address"):
        Http("x", "localhost:8000", request_s=1, retry_s=1)
    with pytest.raises(ConfigError, match="not an address"):
        Http("x", "http://host:port", request_s=1, retry_s=1)


def test_a_server_that_does_not_fit_is_refused_before_anything_is_generated(stub: Any) -> None:
    fitting = serve(stub, "student", SHARED)
    assert check_server(fitting, 999, 20, "/models/stub").endswith(
        "/models/stub, context 1000; scoring reads its cache"
    )
    assert "it serves '/models/stub', and model.teacher.path is 'other'" in check_server(fitting, 999, 20, "other")
    for vocabulary, words in (
        (SHARED + 1, "smaller vocabulary than the 62"),
        (SHARED - 1, "larger vocabulary than the 60"),
    ):
        with pytest.raises(ServerError, match=words):
            check_server(serve(stub, "student", vocabulary), 100, 5)
    with pytest.raises(ServerError, match=r"--max-model-len=1001 or more, or set train\.max_length=999"):
        check_server(fitting, 1000, 20)
    with pytest.raises(ServerError, match=r"gives no 21 log-probabilities.*--max-logprobs=21"):
        check_server(fitting, 100, 21)
    stub.processed = True
    with pytest.raises(ServerError, match="start it with --logprobs-mode=raw_logprobs"):
        check_server(fitting, 100, 5)
