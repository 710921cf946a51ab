"""The bytes that each token of a tokenizer stands for: what two tokenizers that share no ids can be compared by.

    spelling = Spelling(tokenizer)
    spelling.of(ids)                # [b"Hel", b"lo", None]: None is a token without text (end of sequence, a role of a chat)

Three families are read from the tokenizer's own decoder: byte-level BPE (GPT-2 and what came after it), SentencePiece (``▁`` for
a space, ``<0x0A>`` for a byte), and tokens that are their text. Others are refused: their tokens cannot be put together to a
text exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.errors import ModelError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling:
    """What the tokens of ``tokenizer`` stand for; ``who`` names its model in errors.

    Raises ModelError for a tokenizer whose tokens have no bytes of their own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, who: str) -> None:
        steps = list(_steps(_decoder(tokenizer, who)))
        kinds = {step["type"] for step in steps}
        unknown = kinds - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
        if unknown or not kinds:
            raise ModelError(
                f"{who}'s tokenizer puts texts together by {', '.join(sorted(unknown)) or 'no rule of its own'}, which "
                "does not say what bytes a token stands for; tokenizers of different families can be aligned where they are "
                "byte-level BPE, SentencePiece or characters. Choose another teacher, or one of the student's family"
            )
        self.end = tokenizer.eos_token_id
        # SentencePiece writes a space in front of every text and takes it away again.
        self.lead = any(_strips_start(step) for step in steps)
        self._tokens = _spelled(tokenizer, "ByteLevel" in kinds, "ByteFallback" in kinds, _spaces(steps))

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, token: int) -> bytes | None:
        """Of one token, wherever it stands; None for one without text, and for ids that pad the vocabulary."""
        return self._tokens[token] if 0 <= token < len(self._tokens) else None

    def of(self, ids: Sequence[int]) -> list[bytes | None]:
        """Of each token of a whole text: the space that the tokenizer has put in front of it is left out."""
        pieces = [self[token] for token in ids]
        if self.lead and pieces and (first := pieces[0]) is not None:
            pieces[0] = first.removeprefix(b" ")
        return pieces


def _decoder(tokenizer: PreTrainedTokenizerBase, who: str) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{who}'s tokenizer ({type(tokenizer).__name__}) has no tokenizer.json; save it again as a fast tokenizer"
        )
    return json.loads(backend.to_str())["decoder"] or {}


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder:
        yield decoder


def _strips_start(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never")
    return bool(step["type"] == "Strip" and step["content"] == " " and step["start"])


def _spaces(steps: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What stands for other text within a token (``▁`` for a space)."""
    marks = {step["replacement"]: " " for step in steps if step["type"] == "Metaspace"}
    replaced = [step for step in steps if step["type"] == "Replace" and "String" in step["pattern"]]
    return marks | {step["pattern"]["String"]: step["content"] for step in replaced}


def _spelled(
    tokenizer: PreTrainedTokenizerBase, byte_level: bool, byte_fallback: bool, marks: dict[str, str]
) -> list[bytes | None]:
    table = _byte_of_character() if byte_level else {}
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    tokens: list[bytes | None] = [None] * len(tokenizer)
    for text, number in tokenizer.get_vocab().items():
        if byte_fallback and (byte := _BYTE.fullmatch(text)):
            tokens[number] = bytes([int(byte[1], 16)])
        elif number in special:
            continue
        elif number in added:  # matched as it is written
            tokens[number] = text.encode()
        elif byte_level:
            tokens[number] = bytes(table[character] for character in text)
        else:
            tokens[number] = _unmarked(text, marks).encode()
    return tokens


def _unmarked(text: str, marks: dict[str, str]) -> str:
    for mark, meaning in marks.items():
        text = text.replace(mark, meaning)
    return text


def _byte_of_character() -> dict[str, int]:
    """The table of GPT-2: printable bytes of Latin-1 are themselves, the other 68 are the characters from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
