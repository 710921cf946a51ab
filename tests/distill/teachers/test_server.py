"""A teacher behind servers that fail in every way that servers do: the same signals, in order, and a run that waits.

The stand-in is tests/distill/rollouts/vllm_stub.py; the real server is in tests/vllm.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Rank, RankPool, load
from transformers import AutoModelForCausalLM

from distill.data import TokenSequence, collate
from distill.data.batch import TokenBatch
from distill.endpoints import Backoff, Endpoint, key_from
from distill.errors import ConfigError, TeacherRankLost
from distill.teachers.frozen import FrozenModel
from distill.teachers.signals import Signal, TopK

placements = load(Path(__file__).with_name("placements.py"), "placements")
VllmStub, open_stub = placements.VllmStub, placements.open_stub

pytestmark = pytest.mark.unit

SEQUENCES = [TokenSequence([2 + (3 * i + j * j) % 13 for j in range(4 + i)], 1 + i % 3, f"text-{i}") for i in range(9)]


def batches(count: int = 3) -> list[TokenBatch]:
    return [collate(SEQUENCES[3 * n % 9 : 3 * n % 9 + 3], 0, 12 if n % 2 else None) for n in range(count)]


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("server") / "teacher", 3)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def stub(model: Any) -> Iterator[Any]:
    with VllmStub(model) as server:
        yield server


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[..., Any]]:
    """``opened(urls, kind="topk", **how)``: closed when the test ends."""
    scorers: list[Any] = []

    def opening(urls: list[str], kind: str = "topk", **how: Any) -> Any:
        scorers.append(open_stub(urls, folder, kind, 5, **how))
        return scorers[-1]

    yield opening
    for scorer in scorers:
        scorer.close()


def taken(scorer: Any, wanted: list[TokenBatch]) -> list[Signal]:
    scorer.submit(wanted)
    return [scorer.take(batch) for batch in wanted]


def same(ours: list[Signal], theirs: list[Signal]) -> bool:
    assert all(isinstance(signal, TopK) for signal in (*ours, *theirs))
    return all(
        torch.equal(a.ids, b.ids) and torch.equal(a.logprobs, b.logprobs) for a, b in zip(ours, theirs, strict=True)
    )


def reset(handler: Any, _: dict[str, Any]) -> None:
    """The connection ends with a reset, as that of a process that is killed."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def half(handler: Any, body: dict[str, Any]) -> None:
    """Only so many of the bytes that it announces."""
    data = json.dumps(handler.completion(body)[1]).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def malformed(handler: Any, body: dict[str, Any]) -> None:
    text = json.dumps(handler.completion(body)[1])
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(text) // 2))
    handler.end_headers()
    handler.wfile.write(text[: len(text) // 2].encode())


def says(status: int, **headers: str) -> Callable[[Any, dict[str, Any]], None]:
    return lambda handler, body: handler.reply(status, {"error": {"message": "not now"}}, **headers)


def slow(handler: Any, body: dict[str, Any]) -> None:
    time.sleep(0.3)
    handler.reply(*handler.completion(body))


def other(handler: Any, body: dict[str, Any]) -> None:
    answer = handler.completion(body)[1]
    answer["model"] = "somebody-else"
    handler.reply(200, answer)


def fewer(handler: Any, body: dict[str, Any]) -> None:
    answer = handler.completion(body)[1]
    answer["choices"][0]["prompt_logprobs"].pop()
    handler.reply(200, answer)


def not_a_number(handler: Any, body: dict[str, Any]) -> None:
    """At the last token, which every sequence has a target for: what is said of the prompt is not read."""
    answer = handler.completion(body)[1]
    said = answer["choices"][0]["prompt_logprobs"]
    said[-1] = {token: {"logprob": float("nan")} for token in said[-1]}
    handler.reply(200, answer)


FAULTS = {
    "500": says(500), "502": says(502), "503": says(503), "429": says(429, Retry_After="0.01"), "reset": reset, "half": half,
    "malformed": malformed, "slow": slow, "other": other, "fewer": fewer, "nan": not_a_number,
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_now_and_then_changes_nothing(stub: Any, opened: Callable[..., Any], name: str) -> None:
    scorer, wanted = opened([stub.url]), batches()
    want = taken(scorer, wanted)
    scorer.figures()
    stub.faults = [FAULTS[name], FAULTS[name]]
    got = taken(scorer, wanted)
    assert same(got, want)
    figures = scorer.figures()
    assert figures["requests"] == 9
    # A reset of a kept connection is met by a new one, which is no failure; a check may meet the second fault.
    assert figures["retries"] in {"slow": {0}, "reset": {0, 1, 2}}.get(name, {1, 2})
    assert figures["bytes"] == 8 * 5 * sum(len(batch.target_ids) for batch in wanted)


def test_one_sequence_gives_the_bits_of_the_teacher_itself(stub: Any, opened: Callable[..., Any], model: Any) -> None:
    """What the server's JSON says reads back as the same fp32 numbers: nothing is lost on the way."""
    scorer, batch = opened([stub.url]), collate(SEQUENCES[8:], 0, None)
    signal = taken(scorer, [batch])[0]
    rows = stub.rows(SEQUENCES[8].ids)[batch.target_index[:, 1]]
    values, ids = rows.topk(5)
    assert isinstance(signal, TopK)
    assert torch.equal(signal.ids, ids)
    assert torch.equal(signal.logprobs, values)
    expected = FrozenModel(model).signal(batch, "topk", 5)
    assert isinstance(expected, TopK)
    torch.testing.assert_close(signal.logprobs, expected.logprobs, rtol=1e-6, atol=1e-6)


def test_only_what_is_needed_is_sent_and_only_so_far_ahead(stub: Any, opened: Callable[..., Any]) -> None:
    scorer = opened([stub.url], queue=1)
    partly = TokenSequence([3, 4, 5, 6, 7, 8], 2, "partly", supervised=[False, True, False, False])
    nothing = TokenSequence([3, 4], 1, "nothing", supervised=[False])
    stub.sent.clear()
    first, rest = collate([partly, nothing], 0, None), batches(3)
    scorer.submit([first, *rest])
    deadline = time.monotonic() + 10
    while len(stub.sent) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    prompts = [body["prompt"] for _, body in stub.sent]
    assert [3, 4, 5, 6] in prompts, "up to the last token that counts"
    assert len(prompts) == 1 + 3, "of the two oldest micro-batches"
    assert len(scorer.take(first)) == 1
    stub.delay_s = 0.1
    scorer.cancel()
    time.sleep(0.2)
    stub.sent.clear()
    assert len(taken(scorer, rest[2:])[0]) == len(rest[2].target_ids)
    assert sorted(body["prompt"] for _, body in stub.sent) == sorted(s.ids for s in SEQUENCES[6:9]), "nothing given up"


def test_a_dead_server_pauses_the_run_until_it_is_back(
    stub: Any, opened: Callable[..., Any], model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer, wanted = opened([stub.url]), batches(6)
    want = taken(scorer, wanted)
    changed, tuned = threading.Event(), AutoModelForCausalLM.from_config(model.config).eval()
    servers: list[Any] = []

    def come_back() -> None:
        time.sleep(3.0)
        stub.model = tuned
        servers.append(stub.up())  # first with other weights
        time.sleep(0.6)
        servers[0].model = model
        changed.set()

    scorer.submit(wanted)
    got = [scorer.take(wanted[0])]
    stub.down()
    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        got += [scorer.take(batch) for batch in wanted[1:4]]
        assert changed.is_set() or same(got, want[:4])
        got += [scorer.take(batch) for batch in wanted[4:]]
        assert changed.is_set(), "another model's answers were used"
        assert same(got, want)
        assert scorer.figures()["paused_s"] > 0.1
        told = re.sub(r"\s+", " ", capsys.readouterr().err)
        assert "the run pauses: no server of the teacher has answered for" in told
        assert "answers with another model than this run began with" in told
        assert "the run goes on after a pause of" in told
    finally:
        thread.join()
        servers[0].down()


def test_a_server_that_was_exchanged_while_nobody_asked_is_seen(
    stub: Any,
    opened: Callable[..., Any],
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("distill.teachers.server.pool.CHECKED_S", 0.0)
    scorer, wanted = opened([stub.url]), batches()
    want = taken(scorer, wanted)
    stub.down()
    stub.model = AutoModelForCausalLM.from_config(model.config).eval()
    again = stub.up()
    timer = threading.Timer(1.5, lambda: setattr(again, "model", model))
    timer.start()
    assert same(taken(scorer, wanted), want)
    assert "answers with another model" in re.sub(r"\s+", " ", capsys.readouterr().err)
    again.down()


def test_a_server_that_stays_away_ends_the_wait(stub: Any, opened: Callable[..., Any]) -> None:
    scorer = opened([stub.url], pause_s=0.5)
    stub.down()
    began = time.monotonic()
    with pytest.raises(TeacherRankLost) as caught:
        taken(scorer, batches(1))
    assert 0.5 < time.monotonic() - began < 5
    assert re.search(
        rf"no server of the teacher has answered for \d s \(teacher\.server\.pause_s=0\.5\): {stub.url}: .*Connection.*"
        "Start it again, and run the same command once more",
        str(caught.value),
    )
    scorer.cancel()
    again = stub.up()
    time.sleep(0.3)
    assert len(taken(scorer, batches(1))) == 1
    again.down()


def test_the_others_go_on_without_one(
    model: Any, opened: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, absent = VllmStub(model), VllmStub(model), VllmStub(model)
    absent.down()
    scorer = opened([first.url, second.url, absent.url], concurrency=1)
    assert "not there yet" in capsys.readouterr().err
    for each in (first, second):
        each.sent.clear()
    want = taken(scorer, batches())
    assert abs(len(first.sent) - len(second.sent)) <= 1, "in turn"
    second.down()
    assert same(taken(scorer, batches()), want)
    told = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert f"the teacher's server at {second.url} is left out" in told
    late = absent.up()
    deadline = time.monotonic() + 10
    while late.url not in {f"http://127.0.0.1:{late.server_address[1]}"} or not any(
        path == "/v1/completions" for path, _ in late.sent
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.down()
    assert same(taken(scorer, batches()), want), "the one that came late has taken over"
    late.down()


def test_a_refusal_is_told_at_once(stub: Any, opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = opened([stub.url])
    stub.sent.clear()
    stub.context = 6
    with pytest.raises(TeacherRankLost) as caught:
        taken(scorer, [collate(SEQUENCES[4:5], 0, None)])
    assert str(caught.value).startswith(
        f"the teacher's server at {stub.url} refuses the 8 tokens of text-4 (status 400: This model's maximum context length is 6"
    )
    assert "--max-model-len" in str(caught.value)
    assert len(stub.sent) == 1
    scorer.cancel()
    stub.context, stub.key = 1000, "top-secret"
    with pytest.raises(TeacherRankLost, match=r"status 401.*set VLLM_API_KEY in the environment to its key"):
        taken(scorer, batches(1))
    monkeypatch.setenv("MY_KEY", "top-secret")
    assert len(taken(opened([stub.url], key_variable="MY_KEY"), batches(1))) == 1
    monkeypatch.setenv("MY_KEY", "wrong-secret")
    with pytest.raises(Exception, match="set MY_KEY in the environment") as refused:
        opened([stub.url], key_variable="MY_KEY")
    assert "secret" not in str(refused.value)


def test_a_request_that_no_server_survives_is_named(stub: Any, opened: Callable[..., Any]) -> None:
    scorer = opened([stub.url])

    def spoil(request: dict[str, Any], answer: dict[str, Any]) -> None:
        if request["prompt"] == SEQUENCES[1].ids:
            answer["choices"][0]["prompt_logprobs"][2] = {str(SEQUENCES[1].ids[2]): {"logprob": float("-inf")}}

    stub.spoil = spoil
    with pytest.raises(
        TeacherRankLost, match=r"failed 8 times over the 5 tokens of text-1, and answers other requests"
    ) as caught:
        taken(scorer, batches(1))
    assert stub.url in str(caught.value)


def on_two_ranks(me: Rank, folder: str, dead_s: float) -> tuple[bool, float]:
    """Rank 1's server dies for longer than the process group waits."""
    import torch.distributed as dist

    me.init("gloo", fresh=True, timeout=timedelta(seconds=2))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    stub = VllmStub(model)
    scorer = open_stub([stub.url], Path(folder), "topk", 5, timeout_s=2.0)
    wanted = batches()
    want = taken(scorer, wanted)
    if me.rank == 1:
        stub.down()
        timer = threading.Timer(dead_s, stub.up)
        timer.start()
    began = time.monotonic()
    got = taken(scorer, wanted)
    seconds = time.monotonic() - began
    scorer.close()
    dist.destroy_process_group()
    return same(got, want), seconds


@pytest.mark.dist
def test_a_rank_whose_server_is_away_keeps_the_others_waiting_not_failing(two_ranks: RankPool, folder: Path) -> None:
    answers = two_ranks.run(on_two_ranks, str(folder), 3.0)
    assert all(alike and seconds > 2.5 for alike, seconds in answers)


def trained(me: Rank, overrides: list[str]) -> Any:
    """The summary of ``distill train``, or the message with which it stops."""
    from distill.config import load_config
    from distill.errors import DistillError
    from distill.train import train

    me.init("gloo")
    try:
        return train(load_config("config", overrides))
    except DistillError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.dist
def test_training_goes_on_after_a_pause_and_saves_what_it_cannot_finish(
    one_rank: RankPool, base_overrides: list[str], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models["teacher"])
    stub = VllmStub(AutoModelForCausalLM.from_pretrained(tiny_models["teacher"]).eval(), tokenizer=tokenizer)
    shared = [*base_overrides, "method=gkd", "comm.backend=gloo", "teacher.top_k=7", "train.micro_batch_size=4"]
    served = [*shared, "teacher=server", f"teacher.server.url=['{stub.url}']", "teacher.server.retry_s=0.1"]

    def losses(name: str) -> list[float]:
        return [json.loads(line)["train/loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    def interrupt(name: str, away_s: float | None) -> None:
        """Once a step is done the server goes away."""
        nonlocal stub
        file, deadline = tmp_path / name / "metrics.jsonl", time.monotonic() + 50
        while not (file.exists() and file.read_bytes().count(b"\n")) and time.monotonic() < deadline:
            time.sleep(0.005)
        stub.down()
        if away_s is not None:
            time.sleep(away_s)
            stub = stub.up()

    def run(name: str, overrides: list[str], away_s: float | None) -> Any:
        thread = threading.Thread(target=interrupt, args=(name, away_s))
        thread.start()
        answer = one_rank.run(trained, [*overrides, f"run.dir={tmp_path}/{name}"])[0]
        thread.join()
        return answer

    one_rank.run(trained, [*shared, "teacher.signal=topk", f"run.dir={tmp_path}/colocated"])
    assert run("paused", served, 1.0)["steps"] == 4
    assert losses("paused") == pytest.approx(losses("colocated"), rel=1e-5)
    told = run("gone", [*served, "teacher.server.pause_s=0.3"], None)
    assert told.startswith("TeacherRankLost: no server of the teacher has answered for")
    done = len(losses("gone"))
    assert 1 <= done < 4
    assert (tmp_path / "gone" / "checkpoints" / f"step_{done:08d}").is_dir()
    stub = stub.up()
    one_rank.run(trained, [*served, f"run.dir={tmp_path}/gone"])
    assert losses("gone") == pytest.approx(losses("colocated"), rel=1e-5)
    stub.down()


def test_addresses_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("localhost:8000", "http://host", "http://host:port", "ftp://host:21", ""):
        with pytest.raises(ConfigError, match="not an address"):
            Endpoint(address, request_s=1.0)
    with pytest.raises(ConfigError, match="holds a user, password or query") as caught:
        Endpoint("http://me:hidden@host:80", request_s=1.0)
    assert "hidden" not in str(caught.value)
    assert Endpoint("https://host/v1/", request_s=1.0).address == "https://host"
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert key_from(None) is None
    with pytest.raises(ConfigError, match="NO_SUCH"):
        key_from("NO_SUCH")
    monkeypatch.setenv("MY_KEY", "hid\nden")
    with pytest.raises(ConfigError, match="no key that fits") as caught:
        key_from("MY_KEY")
    assert "hid" not in str(caught.value)


def test_pauses_grow_with_jitter_up_to_a_bound_and_heed_the_server() -> None:
    pauses = [[backoff.pause() for _ in range(12)] for backoff in (Backoff(8.0) for _ in range(50))]
    for n in range(12):
        nominal = min(0.25 * 2**n, 8.0)
        assert all(nominal / 2 <= row[n] <= nominal for row in pauses)
        assert len({row[n] for row in pauses}) > 40
    assert Backoff(8.0).pause(asked_s=3.0) == 3.0
    assert Backoff(8.0).pause(asked_s=1e9) == 8.0
