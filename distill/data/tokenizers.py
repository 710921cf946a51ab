"""Tokenizers for models that are built from nothing: one character per token, or byte-level BPE trained on the spot.

Both are ordinary Hugging Face fast tokenizers: ``save_pretrained``, ``AutoTokenizer.from_pretrained`` and a padding
token included, and ``decode(encode(text)) == text`` exactly. Neither has a beginning-of-text token, because prompts
are never empty. Example::

    tokenizer = char_tokenizer(build_task(config, "train").alphabet)
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"


def char_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token per character of ``alphabet`` (duplicates are ignored), after the padding and end tokens.

    Encoding a character outside the alphabet raises (there is no unknown token to hide it).
    """
    if not alphabet:
        raise ValueError("the alphabet of a character tokenizer is empty")
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys((PAD, EOS, *alphabet)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on ``texts``: encodes any text, the same merges for the same texts.

    Args:
        vocab_size: tokens in all, the 256 bytes and the 2 special tokens among them. Fewer come out where the texts
            are too short.
    Raises:
        ValueError: ``vocab_size`` leaves no room for the bytes.
    """
    specials = [PAD, EOS]
    if vocab_size < 256 + len(specials):
        raise ValueError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(specials)} special tokens need a place"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    # clean_up_tokenization_spaces would "repair" spaces before punctuation and break the exact round trip.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
