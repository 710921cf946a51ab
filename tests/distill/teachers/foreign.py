"""Tokenizers of several families, trained here, and texts that they disagree about."""

from __future__ import annotations

import random
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.data import bpe_tokenizer, char_tokenizer
from distill.teachers.spelling import Spelling

TEXTS = [
    "Hello, world! The quick brown fox jumps over the lazy dog.  Two  spaces\n\tand tabs",
    "naïve café – 日本語のテキスト 🙂🙃 done",
    "12 + 30 = 42\n#42",
    "they were there, then the others were",
]
ALPHABET = "".join(sorted({*"".join(TEXTS)}))
FAMILIES = ("bytes", "pieces", "metaspace", "characters")


@cache
def tokenizer(family: str) -> PreTrainedTokenizerBase:
    """``bytes``: byte-level BPE; ``pieces``: SentencePiece's BPE with byte fallback, as Llama has it; ``metaspace``: its
    Unigram; ``characters``."""
    if family == "bytes":
        return bpe_tokenizer(TEXTS * 3, 340)
    if family == "characters":
        return char_tokenizer(ALPHABET)
    made = _pieces() if family == "pieces" else _metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def _pieces() -> Tokenizer:
    """Few characters of its own: the others are bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=120, limit_alphabet=30, show_progress=False))
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    merges = [(left, right) for left, right in _merges(trained)]
    model = models.BPE({t: i for i, t in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>")
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "</s>"])
    return made


def _merges(trained: Tokenizer) -> list[list[str]]:
    import json

    merges: list[list[str]] = json.loads(trained.to_str())["model"]["merges"]
    return merges


def _metaspace() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=list(ALPHABET),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    return made


def random_text(draw: random.Random) -> str:
    """Words of the texts above, spaces, cut-off words and single characters."""
    words = " ".join(TEXTS).split()
    parts = [
        draw.choice((draw.choice(words), draw.choice(words)[1:], " ", "  ", "\n", draw.choice(ALPHABET)))
        for _ in range(8)
    ]
    return "".join(part + draw.choice(("", " ")) for part in parts)


def random_ids(family: str, text: str, draw: random.Random) -> list[int]:
    """``text`` in tokens of a family as a model may write them: not as its tokenizer would."""
    spelling = spellings(family)
    rest, ids = text.encode(), []
    by_piece: dict[bytes, list[int]] = {}
    for number in range(len(spelling)):
        if piece := spelling[number]:
            by_piece.setdefault(piece, []).append(number)
    while rest:
        fitting = [rest[:length] for length in range(1, 9) if rest[:length] in by_piece]
        if not fitting:  # a character that only its tokenizer's bytes can spell
            return list(tokenizer(family)(text, add_special_tokens=False)["input_ids"])
        piece = draw.choice(fitting)
        ids.append(draw.choice(by_piece[piece]))
        rest = rest[len(piece) :]
    return ids


@cache
def spellings(family: str) -> Spelling:
    return Spelling(tokenizer(family), family)
