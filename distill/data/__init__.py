"""Data for distillation: problems with verifiers, token sequences, micro-batches, and an exact order of samples.

The path of a sample is ``Task[index] → Example → TokenSequence → TokenBatch``; :class:`SampleOrder` says which index
comes when. Example::

    task = build_task(data_config({"name": "running_sum"}), "train")
    tokenizer = char_tokenizer(task.alphabet)
    examples = [task[i] for i in SampleOrder(len(task), seed=0).indices(start=0, count=32)]
    sequences = [encode_example(tokenizer, example, max_length=128) for example in examples]
    batch = collate(sequences, tokenizer.pad_token_id, pack_length=None)
"""

import importlib

from distill.data.batch import TokenBatch, collate
from distill.data.config import DataConfig, DataConfigError, data_config
from distill.data.example import Example, NoAnswer, Task, Verdict
from distill.data.order import SampleOrder, shard
from distill.data.packing import PackingLeak, check_packing
from distill.data.partition import Split
from distill.data.tokenize import (
    CannotEncode,
    TokenSequence,
    TooLong,
    encode_example,
    encode_examples,
    encode_prompt,
    encode_response,
)
from distill.data.tokenizers import bpe_tokenizer, char_tokenizer

__all__ = [
    "CannotEncode",
    "DataConfig",
    "DataConfigError",
    "Example",
    "NoAnswer",
    "PackingLeak",
    "SampleOrder",
    "Split",
    "Task",
    "TokenBatch",
    "TokenSequence",
    "TooLong",
    "Verdict",
    "bpe_tokenizer",
    "build_task",
    "char_tokenizer",
    "check_packing",
    "collate",
    "data_config",
    "encode_example",
    "encode_examples",
    "encode_prompt",
    "encode_response",
    "shard",
]

# Imported when used: reasoning-gym is an optional dependency, and answer checking starts up slowly.
_TASKS = {
    "running_sum": "distill.data.running_sum:RunningSum",
    "missing_start": "distill.data.missing_start:MissingStart",
    "chain_sum": "distill.data.reasoning:ChainSum",
    "gsm_symbolic": "distill.data.reasoning:GsmSymbolic",
    "gsm8k": "distill.data.gsm8k:Gsm8k",
    "jsonl": "distill.data.jsonl:Jsonl",
    "mixed": "distill.data.mixed:Mixed",
}


def build_task(config: DataConfig, split: Split) -> Task:
    """The dataset that ``config`` describes, one split of it.

    Raises:
        DataConfigError: ``split`` is not ``train`` or ``test``.
        ValueError, OSError: what the dataset itself finds wrong (no such file, broken line, nothing in it).
    """
    if split not in ("train", "test"):
        raise DataConfigError("split", split, "choose one of train, test")
    module, _, kind = _TASKS[config.name].partition(":")
    task: Task = getattr(importlib.import_module(module), kind)(config, split)
    return task
