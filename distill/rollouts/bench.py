"""Tokens per second of `Generator` against ``model.generate``, on batches whose responses have mixed lengths.

    python -m distill.rollouts.bench --threads 1 --repeats 5 --json rollouts.json

The model is a tiny Qwen3 whose head is set so that greedy decoding counts down: a prompt ending in token ``k`` gets ``k - 2``,
``k - 3``, … and then EOS. So response lengths are exactly what the benchmark asks for (evenly spread over
``--shortest`` to ``--longest``), all weights do real work, and both engines must produce the same tokens, which is checked.
Runs alternate between the engines; speeds are medians, the ratio is the median of the ratios of neighbouring runs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from distill.rollouts.generator import Generator
from distill.rollouts.sampling import SamplingParams

EOS, PAD, FIRST = 0, 1, 2
"""Special ids, and the lowest id of the countdown (whose successor is EOS)."""

Responses = list[list[int]]


@dataclass(frozen=True)
class Result:
    """One scenario; speeds in response tokens per second."""

    scenario: str
    prompts: int
    tokens: int
    hf: list[float]
    ours: list[float]
    ratio: float
    ratio_range: tuple[float, float]


def countdown_model(hidden: int, layers: int, vocabulary: int, seed: int = 0) -> Qwen3ForCausalLM:
    """A random Qwen3 model with an untied head that maps each token to its predecessor."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=1024,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        table = model.model.embed_tokens.weight.normal_()
        model.lm_head.weight[FIRST : vocabulary - 1] = table[FIRST + 1 :]
        model.lm_head.weight[EOS] = table[FIRST]
    return model


def countdown_prompts(count: int, lengths: tuple[int, int], vocabulary: int, seed: int = 0) -> Responses:
    """Prompts of 4 to 24 random tokens whose responses have evenly spread lengths, in random order."""
    generator = torch.Generator().manual_seed(seed)
    low, high = lengths
    wanted = [low + round(i * (high - low) / max(count - 1, 1)) for i in range(count)]
    order = torch.randperm(count, generator=generator).tolist()
    prompts = []
    for i in order:
        size = int(torch.randint(3, 24, (1,), generator=generator))
        filler = torch.randint(FIRST, vocabulary, (size,), generator=generator).tolist()
        prompts.append([*filler, FIRST + wanted[i] - 1])
    return prompts


def run_hf(model: Any, prompts: Responses, batch: int, limit: int, temperature: float) -> Responses:
    """``model.generate`` on left-padded batches; responses cut after EOS."""
    responses = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        width = max(len(prompt) for prompt in part)
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in part])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part])
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=limit, **sampling)
        for row in out[:, width:].tolist():
            responses.append(row[: row.index(EOS) + 1] if EOS in row else row)
    return responses


def _timed(run: Callable[[], Responses]) -> tuple[float, Responses]:
    start = time.perf_counter()
    responses = run()
    return sum(map(len, responses)) / (time.perf_counter() - start), responses


def measure(scenario: str, prompts: Responses, args: argparse.Namespace, temperature: float) -> Result:
    """Alternate the engines ``args.repeats`` times after one warm-up each; raises if their greedy tokens differ."""
    model = countdown_model(args.hidden, args.layers, args.vocabulary)
    engine = Generator(model, bare_tokenizer(), slots=args.slots)
    params = SamplingParams(max_new_tokens=args.longest, temperature=temperature)

    def ours() -> Responses:
        return [rollout.response_ids for rollout in engine.generate(prompts, params, range(len(prompts)))]

    def hf() -> Responses:
        return run_hf(model, prompts, args.slots, args.longest, temperature)

    expected = hf()
    if ours() != expected and not temperature:
        raise RuntimeError(f"{scenario}: the engines disagree on greedy tokens; the speeds would not be comparable")
    pairs = [(_timed(hf)[0], _timed(ours)[0]) for _ in range(args.repeats)]
    ratios = [mine / theirs for theirs, mine in pairs]
    tokens = sum(map(len, expected))
    hf_speeds, our_speeds = [round(a, 1) for a, _ in pairs], [round(b, 1) for _, b in pairs]
    spread = (round(min(ratios), 2), round(max(ratios), 2))
    return Result(scenario, len(prompts), tokens, hf_speeds, our_speeds, round(statistics.median(ratios), 2), spread)


def bare_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": EOS}, "<eos>")), eos_token="<eos>"
    )


def table(results: list[Result]) -> str:
    """The results as aligned text."""
    lines = [f"{'scenario':28} {'prompts':>7} {'tokens':>7} {'HF tok/s':>9} {'ours':>9} {'ratio':>6}  range"]
    for r in results:
        speeds = f"{statistics.median(r.hf):9.0f} {statistics.median(r.ours):9.0f}"
        lines.append(
            f"{r.scenario:28} {r.prompts:7} {r.tokens:7} {speeds} {r.ratio:6.2f}  {r.ratio_range[0]}–{r.ratio_range[1]}"
        )
    return "\n".join(lines)


def bench_parser(documentation: str | None, numbers: Mapping[str, tuple[int, str]]) -> argparse.ArgumentParser:
    """A parser of whole numbers, by name with (default, meaning), and of ``--json``, see `write_results`."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, what) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    parser.add_argument("--json", type=Path, help="also write the results and settings to this file")
    return parser


def write_results(args: argparse.Namespace, results: Sequence[Any], **more: Any) -> None:
    """Where ``--json`` says: all settings, `more` of them, and the results (dataclasses)."""
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"} | more
        record = {"settings": settings, "results": [asdict(result) for result in results]}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line arguments."""
    numbers = {
        "threads": (1, "torch threads"),
        "repeats": (5, "runs per engine and scenario"),
        "slots": (64, "rows in flight, and the batch size of generate"),
        "shortest": (16, "shortest response in tokens"),
        "longest": (256, "longest response in tokens"),
        "hidden": (96, "hidden size of the model"),
        "layers": (3, "layers of the model"),
        "vocabulary": (512, "vocabulary size"),
    }
    parser = bench_parser(__doc__, numbers)
    args = parser.parse_args(argv)
    if args.vocabulary < FIRST + args.longest:
        parser.error(
            f"--vocabulary must be at least {FIRST + args.longest} to count down from --longest {args.longest}"
        )
    return args


def main(argv: list[str] | None = None) -> list[Result]:
    """Run all scenarios, print the table, write the JSON."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    spread = (args.shortest, args.longest)
    one = countdown_prompts(args.slots, spread, args.vocabulary)
    many = countdown_prompts(4 * args.slots, spread, args.vocabulary, seed=1)
    equal = countdown_prompts(args.slots, (args.longest // 2,) * 2, args.vocabulary)
    results = [
        measure("one batch, greedy", one, args, 0.0),
        measure("one batch, sampled", one, args, 1.0),
        measure("four batches, greedy", many, args, 0.0),
        measure("one batch, equal lengths", equal, args, 0.0),
    ]
    parameters = sum(p.numel() for p in countdown_model(args.hidden, args.layers, args.vocabulary).parameters())
    print(f"{parameters:,} parameters, {args.threads} thread(s), torch {torch.__version__}, median of {args.repeats}")
    print(table(results))
    write_results(args, results, parameters=parameters)
    return results


if __name__ == "__main__":
    main()
