"""Sequences per second that a served teacher scores, beside the same model in this process.

    python -m distill.bench.server MODEL_FOLDER http://HOST:PORT --sequences 64 --length 512 --top-k 64 --json out.json

Both score the same texts of random token ids, all tokens but the first supervised, in micro-batches of ``--micro-batch``; the two
take turns, speeds are medians of ``--repeats`` runs. The largest difference of a log-probability is reported with them. Texts are
new in each run, so that no server answers from a cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from distill.data.batch import TokenBatch, collate
from distill.data.tokenize import TokenSequence
from distill.distributed import device
from distill.endpoints import Endpoint, key_from
from distill.errors import DistillError
from distill.runs import write_json
from distill.teachers.colocated import Colocated
from distill.teachers.frozen import FrozenModel
from distill.teachers.server.pool import Member, Pool
from distill.teachers.server.probe import Need, NotNow, examine, recheck, refusal
from distill.teachers.server.question import Question
from distill.teachers.server.scorer import ServerScorer
from distill.teachers.signals import SampledToken, Signal, TopK


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _options(arguments)
    try:
        result = measure(options)
    except (DistillError, NotNow) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.sequences} × {options.length} tokens, {options.signal}: server {result['server']:.2f} sequences/s, in process "
        f"{result['process']:.2f}, ratio {result['ratio']:.2f}; {result['json_bytes_per_token']:.0f} bytes of JSON per token "
        f"({result['bytes_per_token']:.0f} of signal); largest difference {result['difference']:.2g} nats"
    )
    if options.json:
        write_json(Path(options.json), result)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Speeds in sequences per second, bytes per token, and how far the two are apart."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    torch.nn.Module.to(model, device())
    ours = Colocated(FrozenModel(model), options.signal, options.top_k)
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    theirs = _served(options, tokenizer, vocabulary)
    speeds: dict[str, list[float]] = {"server": [], "process": []}
    difference, tokens, figures = 0.0, 0, {"bytes": 0.0, "wire_bytes": 0.0}
    try:
        for repeat in range(options.repeats + 1):  # the first one warms both up
            batches = _batches(options, min(vocabulary, len(tokenizer)), repeat)
            said: dict[str, list[Signal]] = {}
            for name, scorer in (("server", theirs), ("process", ours)):
                began = time.perf_counter()
                scorer.submit(batches)
                said[name] = [scorer.take(batch) for batch in batches]
                if repeat:
                    speeds[name].append(options.sequences / (time.perf_counter() - began))
            found = theirs.figures()
            if repeat:
                figures = {key: figures[key] + found[key] for key in figures}
                tokens += sum(len(batch.target_ids) for batch in batches)
            pairs = zip(said["server"], said["process"], strict=True)
            difference = max([difference, *(float((_best(a) - _best(b)).abs().max()) for a, b in pairs)])
    finally:
        theirs.close()
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        **vars(options),
        **medians,
        "ratio": medians["server"] / medians["process"],
        "all": speeds,
        "bytes_per_token": figures["bytes"] / tokens,
        "json_bytes_per_token": figures["wire_bytes"] / tokens,
        "difference": difference,
    }


def _served(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> ServerScorer:
    need = Need(tokenizer, vocabulary, True, options.length, options.signal, options.top_k)
    endpoints = [Endpoint(url, request_s=options.request_s, key=key_from(None)) for url in options.url]
    facts = examine(endpoints[0], need)
    for endpoint in endpoints[1:]:
        examine(endpoint, need, facts)
    note: Callable[[str], None] = lambda text: print(text, file=sys.stderr)  # noqa: E731
    pool = Pool(
        [Member(endpoint) for endpoint in endpoints],
        lambda endpoint: recheck(endpoint, need, facts),
        lambda endpoint, reply, what: refusal(endpoint, reply, need, what),
        retry_s=5.0,
        pause_s=60.0,
        note=note,
    )
    question = Question(need.kind, need.wanted, facts.model)
    return ServerScorer(pool, question, concurrency=options.concurrency, queue=options.queue, tick_s=1.0, note=note)


def _batches(options: argparse.Namespace, most: int, repeat: int) -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(repeat)
    ids = torch.randint(most, (options.sequences, options.length), generator=generator).tolist()
    texts = [TokenSequence(row, 1, f"text-{number}") for number, row in enumerate(ids)]
    size = options.micro_batch
    return [collate(texts[n : n + size], 0, None).to(device()) for n in range(0, len(texts), size)]


def _best(signal: Signal) -> Tensor:
    """Log-probability of each token, or of the most likely one: what does not depend on ties."""
    assert isinstance(signal, TopK | SampledToken)
    return signal.logprobs[:, 0] if isinstance(signal, TopK) else signal.logprobs


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m distill.bench.server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder of the model that is served, with its tokenizer")
    parser.add_argument("url", nargs="+", help="http://HOST:PORT or unix:/PATH; several share the work")
    parser.add_argument("--signal", choices=("topk", "sampled"), default="topk")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--queue", type=int, default=2)
    parser.add_argument("--request-s", type=float, default=600.0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
