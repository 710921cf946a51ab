"""Tokenizers built from nothing: exact round trips, saving, determinism."""

import pytest
from transformers import AutoTokenizer

from distill.data import bpe_tokenizer, char_tokenizer

pytestmark = pytest.mark.unit

TEXTS = ["Natalia sold 48/2 = 24 clips.\n#### 24", "  two  spaces , and\ttabs\n\n", "naïve café 你好 🙂", ""]


def test_characters_round_trip_and_save(tmp_path):
    tokenizer = char_tokenizer("0123456789+-=\n#")
    text = "9-9+8=\n0\n8\n#8"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 17)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == ids
    assert again.decode([*ids, 1]) == text + "<eos>"
    assert again.decode([*ids, 1, 0, 0], skip_special_tokens=True) == text
    assert (again.pad_token_id, again.eos_token_id) == (0, 1)


def test_odd_alphabets_round_trip():
    alphabet = "ab <>.,'!?\n\t é你🙂"
    tokenizer = char_tokenizer(alphabet + alphabet)
    text = "a b , . ! ?  <a> é\n\n你🙂'b\t "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_character_outside_the_alphabet_is_an_error_not_a_silence():
    with pytest.raises(Exception, match="UNK"):
        char_tokenizer("abc")("abd")
    with pytest.raises(ValueError, match="empty"):
        char_tokenizer("")


def test_bpe_round_trips_any_text_and_is_deterministic(tmp_path):
    tokenizer, twin = (bpe_tokenizer(TEXTS * 3, 300) for _ in range(2))
    assert tokenizer.get_vocab() == twin.get_vocab()
    for text in [*TEXTS, "never seen before: ß∂ƒ\x00\r\n", " leading", "trailing "]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 300
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0])
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS[2])["input_ids"] == tokenizer(TEXTS[2])["input_ids"]
    assert again.decode(again(TEXTS[1])["input_ids"]) == TEXTS[1]


def test_bpe_needs_room_for_all_bytes():
    with pytest.raises(ValueError, match="vocab_size=200"):
        bpe_tokenizer(TEXTS, 200)
