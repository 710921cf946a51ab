"""A teacher behind a real vLLM server: the signals of the teacher in process, to the rounding of two implementations.

Runs before test_vllm.py, whose last test kills a server.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from harness import RankPool, load

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

CLOSE = 1e-4  # vLLM's fp32 attention and matrix products sum in another order than transformers'


def placements() -> Any:
    return load(Path(__file__).parents[1] / "distill" / "teachers" / "placements.py", "placements")


def batches(count: int, length: int) -> list[Any]:
    from distill.data import TokenSequence, collate

    found = []
    for n in range(count):
        texts = [[2 + (5 * i * i + (n + j) * i) % 15 for i in range(length - j)] for j in range(4)]
        found.append(collate([TokenSequence(ids, 5, f"text-{n}-{j}") for j, ids in enumerate(texts)], 0, length))
    return found


@pytest.mark.parametrize("kind", ["topk", "sampled", "logits"])
def test_signals_equal_those_of_the_teacher_in_process(pair: Any, kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from distill.teachers.frozen import FrozenModel
    from distill.teachers.signals import FullLogits, SampledToken, TopK

    folder, url = pair.folders["teacher"], pair.servers["teacher"].address
    torch.set_num_threads(1)
    teacher, wanted = FrozenModel(AutoModelForCausalLM.from_pretrained(folder)), batches(6, 120)
    scorer = placements().open_stub([url], folder, kind, 6, concurrency=8, request_s=120.0, pause_s=120.0)
    try:
        began = time.perf_counter()
        scorer.submit(wanted)
        signals = [scorer.take(batch) for batch in wanted]
        seconds = time.perf_counter() - began
        figures = scorer.figures()
    finally:
        scorer.close()
    for signal, batch in zip(signals, wanted, strict=True):
        expected = teacher.signal(batch, kind, 6)
        if isinstance(signal, TopK):
            assert isinstance(expected, TopK)
            assert (signal.ids == expected.ids).float().mean() > 0.99  # all but tied ones may change places
            torch.testing.assert_close(signal.logprobs, expected.logprobs, rtol=0, atol=CLOSE)
        elif isinstance(signal, SampledToken):
            assert isinstance(expected, SampledToken)
            torch.testing.assert_close(signal.logprobs, expected.logprobs, rtol=0, atol=CLOSE)
        else:
            assert isinstance(signal, FullLogits)
            torch.testing.assert_close(signal.logits(), expected.logits().log_softmax(-1), rtol=0, atol=CLOSE)
    print(
        f"{kind}: {24 / seconds:.1f} sequences/s, {figures['wire_bytes'] / figures['bytes']:.1f} bytes of JSON per byte of signal"
    )
    assert figures["requests"] == 24
    assert figures["retries"] == 0


def test_what_this_server_cannot_do_is_seen_at_the_start(pair: Any) -> None:
    from transformers import AutoTokenizer

    from distill.endpoints import Endpoint
    from distill.errors import ServerError
    from distill.teachers.server.probe import Need, examine

    tokenizer = AutoTokenizer.from_pretrained(pair.folders["teacher"])
    endpoint = Endpoint(pair.servers["teacher"].address, request_s=120.0)
    values = {"vocabulary": 17, "exact": True, "context": 127, "kind": "topk", "top_k": 6}
    facts = examine(endpoint, Need(tokenizer, **values))
    assert (facts.model, facts.context, facts.tempered) == ("teacher", 128, False)
    for changes, message in (
        ({"context": 128}, r"a context of 128 tokens, and this run needs 129"),
        ({"vocabulary": 18}, "a smaller vocabulary than the 18"),
        ({"vocabulary": 16}, "a larger vocabulary than the 16"),
        ({"model": "gpt"}, "serves teacher, not 'gpt'"),
    ):
        with pytest.raises(ServerError, match=message):
            examine(endpoint, Need(tokenizer, **(values | changes)))
    with pytest.raises(ServerError, match="answers with another model"):
        examine(Endpoint(pair.servers["student"].address, request_s=120.0), Need(tokenizer, **values), facts)


def test_training_gives_the_losses_of_a_teacher_in_process(pair: Any, two_ranks: RankPool, tmp_path: Path) -> None:
    """Off-policy and on-policy text; the student's text from the built-in engine."""
    made = load(Path(__file__).with_name("test_vllm.py"), "test_vllm_workers").made
    size = [
        "train.steps=3",
        "train.batch_size=8",
        "train.micro_batch_size=2",
        "rollout.max_new_tokens=24",
        "engine.lr=0.01",
    ]
    shared = [*pair.overrides(), *size, "run.tensorboard=false", "rollout.temperature=0", "method=gkd"]
    placed = {
        "colocated": ["teacher.signal=topk"],
        "server": ["teacher=server", f"teacher.server.url=['{pair.servers['teacher'].address}']"],
    }
    losses = {}
    for name, overrides in placed.items():
        folder = tmp_path / name
        answers = two_ranks.run(
            made, "train", [*shared, *overrides, "teacher.top_k=6", f"run.dir={folder}"], deadline=300.0
        )
        assert isinstance(answers[0], dict), answers[0]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["train/loss"] for line in lines]
        if name == "server":
            assert all(line["teacher/bytes"] == line["train/tokens"] * 6 * 8 for line in lines)
    assert len(losses["server"]) == 3
    assert losses["server"] == pytest.approx(losses["colocated"], abs=1e-4)
