"""Tiny random models and tokenizers of several kinds for the rollout tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

EOS, PAD, BOS = 0, 1, 2
CORPUS = [
    "First step.\n\nSecond step: naïve café, 東京タワー.\n\nThird step 🙂🙂.\n\nHowever, the answer is 42.\n\n",
    "Σ of 1, 2 and 3 is 6. Then 6 × 7 = 42. ###  Answer: 42 <done> end. Ελληνικά and русский text.\n",
] * 4


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Models this small only lose time to a second thread, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """Factory of random fp32 models whose greedy output is varied (large weights), by architecture name."""

    def build(name: str = "qwen3", *, seed: int = 0, **changes: Any) -> Any:
        kinds = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
        config_class, model_class = kinds[name]
        settings: dict[str, Any] = {
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 96,
            "initializer_range": 0.25,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "tie_word_embeddings": False,
        }
        torch.manual_seed(seed)
        return model_class(config_class(**(settings | changes))).eval()

    return build


@pytest.fixture(scope="session")
def ids_only() -> PreTrainedTokenizerFast:
    """A tokenizer for tests that never look at text."""
    words = {"<eos>": EOS, "<pad>": PAD, "<bos>": BOS, **{f"w{i}": i for i in range(3, 61)}}
    core = Tokenizer(models.WordLevel(words, "<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")


@pytest.fixture(scope="session")
def text_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Byte-level BPE (GPT-2, Qwen, Llama 3), byte-fallback BPE with a metaspace (Llama 2), WordPiece (BERT)."""
    special = ["<eos>", "<pad>", "<bos>"]
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    )

    fallback = Tokenizer(models.BPE(unk_token="<pad>", byte_fallback=True, fuse_unk=True))
    fallback.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    fallback.train_from_iterator(
        [text.replace(" ", "▁") for text in CORPUS],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special + bytes_, limit_alphabet=60),
    )

    pieces = Tokenizer(models.WordPiece(unk_token="<pad>"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    pieces.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    return {
        name: PreTrainedTokenizerFast(
            tokenizer_object=core,
            eos_token="<eos>",
            pad_token="<pad>",
            bos_token="<bos>",
            clean_up_tokenization_spaces=False,
        )
        for name, core in (("byte_level", byte_level), ("byte_fallback", fallback), ("wordpiece", pieces))
    }
