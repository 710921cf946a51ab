"""Rollouts by real vLLM servers: the same numbers, records and losses as in this process, and an end that is told.

The tests run in this order; the last one kills a server.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from harness import Rank, RankPool

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

MONITOR = [
    "method.step_tokens=7",
    'method.delimiters=["\n"]',
    "method.marker='#'",
    "method.epsilon=0.15",
    "method.theta=0.5",
]


def load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def connect(pair: Any, who: str, **how: Any) -> Any:
    """A client of one of the two servers."""
    from distill.rollouts.vllm.client import Server
    from distill.rollouts.vllm.http import Http

    server = Server(who, 17, **how)
    server.http = Http(f"the {who}'s server", pair.servers[who].address, request_s=300.0, retry_s=20.0)
    return server


def logprobs(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)


def test_scores_are_the_models_own_log_probabilities(pair: Any) -> None:
    from distill.rollouts.vllm.checks import check_server

    model, ids = load(pair.folders["teacher"]), [2 + (5 * i * i + i) % 15 for i in range(110)]
    rows = logprobs(model, ids)
    want = [float(rows[p - 1][ids[p]]) for p in range(1, len(ids))]
    following = rows[-1].topk(5).values.tolist()
    for cached in (False, True):
        server = connect(pair, "teacher", cached_scoring=cached)
        assert "context 128" in check_server(server, 127, 20)
        assert server.cached_scoring is cached
        for start in (1, 60, 96, 97, 109):  # 96 tokens are whole blocks
            scores = server.score(ids, start, 5)
            assert scores.logprobs == pytest.approx(want[start - 1 :], abs=1e-4)
            assert scores.following == pytest.approx(following, abs=1e-4)
        assert server.traffic.repeated == (3 if cached else 0)  # starts that the cache had reached already
        assert server.traffic.cached_tokens >= (2 * 96 if cached else 0)
    assert server.peek(ids, 5) == pytest.approx(following, abs=1e-4)
    for position, row in enumerate(server.top(ids, 100, 4), 100):
        best = rows[position - 1].topk(4)
        assert list(row) == best.indices.tolist()
        assert list(row.values()) == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_server_that_does_not_fit_is_refused(pair: Any) -> None:
    from distill.errors import ServerError
    from distill.rollouts.vllm.checks import check_server
    from distill.rollouts.vllm.weights import compare

    for vocabulary, words in ((18, "smaller vocabulary than the 18"), (16, "larger vocabulary than the 16")):
        server = connect(pair, "teacher")
        server.vocabulary = vocabulary
        with pytest.raises(ServerError, match=words):
            check_server(server, 100, 5)
    with pytest.raises(ServerError, match=r"--max-model-len=129 or more, or set train\.max_length=127"):
        check_server(connect(pair, "teacher"), 128, 5)
    server = connect(pair, "teacher")
    server.vocabulary = 10**6  # so that more than the vocabulary is asked for
    with pytest.raises(ServerError, match="smaller vocabulary"):
        check_server(server, 100, 21)
    with pytest.raises(ServerError, match="does not have the student's weights: log-probabilities of a probe differ"):
        compare(connect(pair, "teacher"), load(pair.folders["student"]))


def test_plain_rollouts_equal_the_built_in_ones(pair: Any) -> None:
    from transformers import AutoTokenizer

    from distill.rollouts import Generator, SamplingParams
    from distill.rollouts.vllm.generator import Decoder, VllmGenerator

    model, tokenizer = load(pair.folders["student"]), AutoTokenizer.from_pretrained(pair.folders["student"])
    eos = tokenizer.eos_token_id
    decoder = Decoder(connect(pair, "student"), {eos}, None)
    prompts = [[2 + (7 * i + 3 * j) % 15 for j in range(1 + i % 9)] for i in range(30)]
    finishes = set()
    for stop in ((), ("\n", "77")):
        params = SamplingParams(max_new_tokens=25, temperature=0.0, stop=stop)
        want = Generator(model, tokenizer, context_length=30).generate(prompts, params, range(30))
        got = VllmGenerator(decoder, tokenizer, slots=8, context_length=30).generate(prompts, params, range(30))
        for mine, theirs in zip(got, want, strict=True):
            found = (mine.response_ids, mine.finish, mine.stop_string)
            assert found == (theirs.response_ids, theirs.finish, theirs.stop_string)
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
            finishes.add(mine.finish)
    assert finishes == {"eos", "stop", "length"}
    params = SamplingParams(max_new_tokens=25, temperature=0.9, top_p=0.95)
    generator = VllmGenerator(decoder, tokenizer, slots=8, context_length=30)
    once, again = (
        generator.generate(prompts, params, range(30)),
        generator.generate(prompts[::-1], params, range(29, -1, -1)),
    )
    assert [r.response_ids for r in once] == [r.response_ids for r in again[::-1]]  # by seed, not by order
    rows = logprobs(model, once[0].prompt_ids + once[0].response_ids)  # raw: neither temperature nor top-p shows
    begin = len(once[0].prompt_ids)
    assert once[0].logprobs == pytest.approx(
        [float(rows[begin + t - 1][token]) for t, token in enumerate(once[0].response_ids)], abs=1e-4
    )


def made(me: Rank, command: str, overrides: list[str]) -> Any:
    """The summary of ``distill rollout`` or ``distill train``, or the message with which it stops."""
    from distill.config import load_config
    from distill.errors import DistillError
    from distill.rollout import load_rollout_config, rollout
    from distill.train import train

    me.init("gloo")
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            if command == "rollout":
                return rollout(*load_rollout_config(overrides))
            return train(load_config("config", overrides))
    except DistillError as error:
        return str(error)


def prefix_cache(pair: Any, who: str) -> tuple[float, float]:
    """Tokens that vLLM looked up in its prefix cache so far, and those that it found."""
    text = connect(pair, who).http.ask("GET", "/metrics")[1]
    return tuple(
        sum(float(v) for v in re.findall(rf"^vllm:prefix_cache_{name}_total\{{.*?\}} (\S+)$", text, re.M))
        for name in ("queries", "hits")
    )  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("paper", []),
        ("repairs", ["method.max_breaches=0", "method.keep_flawed=false"]),
        ("masked", ["method.max_breaches=2", "method.mask_flawed=true"]),
    ],
)
def test_records_equal_those_of_the_built_in_engine(
    pair: Any, two_ranks: RankPool, tmp_path: Path, name: str, changes: list[str]
) -> None:
    size = [
        "rollout.examples=8",
        "rollout.samples=1",
        "rollout.max_new_tokens=100",
        "rollout.temperature=0",
        "rollout.slots=6",
    ]
    shared = [*pair.overrides(), *MONITOR, *size, *changes]
    before = prefix_cache(pair, "teacher")
    summaries = {}
    for engine in ("builtin", "vllm"):
        answers = two_ranks.run(made, "rollout", [*shared, *pair.engine(engine), f"run.dir={tmp_path}/{engine}"])
        assert isinstance(answers[0], dict), answers[0]
        summaries[engine] = answers[0]
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / engine / "records.jsonl").read_text().splitlines()]
        for engine in ("builtin", "vllm")
    )
    assert len(ours) == len(theirs) == 8
    for a, b in zip(ours, theirs, strict=True):
        for steps in (a, b):
            steps["figures"] = [[s.pop(key) for key in ("value", "boundary", "entropy")] for s in steps["steps"]]
        assert [x for one in b.pop("figures") for x in one] == pytest.approx(
            [x for one in a.pop("figures") for x in one], abs=2e-5
        )
        assert a == b  # ids, breaches, rewind points, texts, verdicts, counts
    breaches = [line["breach"] for line in ours]
    assert any(breaches)
    assert any(t["step"] > t["rewound_to"] for line in ours for t in line["takeovers"])  # something is rewound
    queries, hits = (now - then for now, then in zip(prefix_cache(pair, "teacher"), before, strict=True))
    print(f"{name}: teacher's prefix cache holds {hits:.0f} of {queries:.0f} tokens looked up")
    if name == "repairs":  # blocks of 32 tokens, steps of at most 7: a text is read about once
        assert hits > 0.4 * queries


def test_new_weights_reach_the_server_and_old_keys_do_not_stay(pair: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from distill.errors import ServerError
    from distill.rollouts import Generator, SamplingParams
    from distill.rollouts.vllm.generator import Decoder, VllmGenerator
    from distill.rollouts.vllm.weights import compare, reload, save

    model, tokenizer = load(pair.folders["student"]), AutoTokenizer.from_pretrained(pair.folders["student"])
    server, params = connect(pair, "student"), SamplingParams(max_new_tokens=20, temperature=0.0)
    prompt = [[2 + (3 * i) % 15 for i in range(70)]]  # two blocks of it will be in the cache
    generator = VllmGenerator(Decoder(server, {tokenizer.eos_token_id}, None), tokenizer, slots=1, context_length=100)
    old = generator.generate(prompt, params, [0])[0]
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn(weights.shape, generator=torch.Generator().manual_seed(3)) * 0.05)
    with pytest.raises(ServerError, match="does not have the student's weights"):
        compare(server, model)
    try:
        save(model, tokenizer, tmp_path / "student", untie=True)
        reload(server, tmp_path / "student")
        assert compare(server, model) < 1e-4
        new = generator.generate(prompt, params, [0])[0]
        want = Generator(model, tokenizer, context_length=100).generate(prompt, params, [0])[0]
        assert new.response_ids == want.response_ids
        assert new.logprobs == pytest.approx(want.logprobs, abs=1e-4)
        assert new.logprobs != pytest.approx(old.logprobs, abs=1e-2)
    finally:
        reload(server, pair.folders["student"])


@pytest.mark.parametrize("method", ["on_policy", "motab"])
def test_training_gives_the_same_losses(pair: Any, two_ranks: RankPool, tmp_path: Path, method: str) -> None:
    """Greedy rollouts of a student that changes with every step: one set of stale weights would show in the next loss."""
    from distill.rollouts.vllm.weights import reload

    monitor = MONITOR if method == "motab" else []
    size = [
        "train.steps=4",
        "train.batch_size=8",
        "train.micro_batch_size=4",
        "rollout.max_new_tokens=24",
        "engine.lr=0.01",
        "run.tensorboard=false",
    ]
    shared = [*pair.overrides(), *monitor, *size, f"method={method}", "rollout.temperature=0"]
    losses = {}
    for engine in ("builtin", "vllm"):
        folder = tmp_path / engine
        answers = two_ranks.run(made, "train", [*shared, *pair.engine(engine), f"run.dir={folder}"])
        assert isinstance(answers[0], dict), answers[0]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[engine] = [line["train/loss"] for line in lines]
    reload(connect(pair, "student"), pair.folders["student"])  # for the tests that follow
    assert len(losses["vllm"]) == 4
    assert losses["vllm"] == pytest.approx(losses["builtin"], abs=1e-4)
    assert len({round(loss, 3) for loss in losses["vllm"]}) > 1
    assert not (tmp_path / "vllm" / "vllm" / "student").exists()  # no weights are left lying about


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from distill.rollouts.vllm.processes import OwnServer, command\n"
        "words = command(sys.argv[1], sys.argv[2], 'student', dtype='float32', context=64, top_k=5, arguments=[])\n"
        "server = OwnServer('student', words, {}, Path(sys.argv[2]) / 'log', updatable=False)\n"
        "print(server._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    words = [sys.executable, "-c", code, os.environ["DISTILL_VLLM_PYTHON"], str(tmp_path)]
    owner = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/status").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "the server outlived its owner"
        time.sleep(0.1)


def test_a_server_killed_mid_run_stops_the_run_with_its_name_and_keeps_the_records(pair: Any, tmp_path: Path) -> None:
    size = [
        "rollout.examples=400",
        "rollout.samples=1",
        "rollout.max_new_tokens=100",
        "rollout.temperature=0",
        "rollout.slots=4",
    ]
    words = [sys.executable, "-m", "distill.rollout", *pair.overrides(), *MONITOR, *size, *pair.engine("vllm")]
    words += ["rollout.vllm.retry_s=3", f"run.dir={tmp_path}/run"]
    job = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    part = tmp_path / "run" / "parts" / "rank_00000.jsonl"

    def kill_after_some() -> None:
        deadline = time.monotonic() + 300
        while not (part.exists() and part.read_bytes().count(b"\n") >= 5) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(pair.servers["teacher"]._process.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_after_some)
    thread.start()
    output, _ = job.communicate(timeout=600)
    thread.join()
    assert job.returncode == 2, output
    assert re.search(r"error: the teacher's vLLM server at unix:\S+ does not answer /\S+ \(", output)
    assert "run the same command once more" in output
    lines = part.read_text().splitlines()
    assert 5 <= len(lines) < 400
    assert all(json.loads(line)["steps"] for line in lines)
    assert "signal 9" in str(pair.servers["teacher"].gone())
