"""Stop strings in token streams, against decoding every prefix from the start."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from distill.rollouts.stops import StopMatcher

pytestmark = pytest.mark.unit

STOPS = [
    (".\n\n",),
    ("é", "東京"),
    ("🙂",),
    ("the answer", "42"),
    (" ",),
    ("<eos>",),
    ("\n",),
    ("e",),
    (". T", "Σ of"),
    ("step", "step."),
]


def first_hit(tokenizer: Any, ids: list[int], stops: tuple[str, ...]) -> int | None:
    """Oracle: the length of the shortest prefix whose text contains a stop string."""
    for size in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:size], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if any(stop in text for stop in stops):
            return size
    return None


def streamed_hit(matcher: StopMatcher, ids: list[int]) -> int | None:
    import numpy as np

    for size in range(1, len(ids) + 1):
        if matcher.suspects(np.array(ids[size - 1 : size]))[0] and matcher.find(ids[:size]) is not None:
            return size
    return None


def streams(tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Random ids, real text encoded in random splits, and mixtures of both, ids past the tokenizer's end included."""
    rng = random.Random(seed)
    text = "First step.\n\nnaïve café, 東京タワー 🙂. Σ of 1 is 42. The answer <done>\n\n"
    out = []
    for _ in range(count):
        ids: list[int] = []
        while len(ids) < 40:
            if rng.random() < 0.3:
                ids += [rng.randrange(len(tokenizer) + 5) for _ in range(rng.randrange(1, 6))]
            else:
                start = rng.randrange(len(text))
                ids += tokenizer.encode(text[start : start + rng.randrange(1, 12)], add_special_tokens=False)
        out.append(ids[:40])
    return out


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "wordpiece"])
@pytest.mark.parametrize("stops", STOPS)
def test_finds_exactly_what_decoding_every_prefix_finds(
    kind: str, stops: tuple[str, ...], text_tokenizers: Any
) -> None:
    tokenizer = text_tokenizers[kind]
    matcher = StopMatcher(tokenizer, stops)
    for ids in streams(tokenizer, 25, seed=len(stops[0])):
        assert streamed_hit(matcher, ids) == first_hit(tokenizer, ids, stops), (kind, stops, ids)


def test_the_streams_do_contain_stops_split_over_tokens(text_tokenizers: Any) -> None:
    tokenizer = text_tokenizers["byte_level"]
    split = sum(
        stop not in tokenizer.decode(ids[size - 1 : size])
        for stops in STOPS
        for stop in stops[:1]
        for ids in streams(tokenizer, 25, seed=len(stops[0]))
        if (size := first_hit(tokenizer, ids, (stop,))) is not None
    )
    assert split > 10


def test_a_character_spread_over_several_tokens_counts_once_complete(text_tokenizers: Any) -> None:
    tokenizer = text_tokenizers["byte_level"]
    ids = tokenizer.encode("a語b", add_special_tokens=False)
    assert len(ids) == 5  # three byte tokens for the character, which is not in the training text
    matcher = StopMatcher(tokenizer, ("語",))
    assert [matcher.find(ids[:size]) for size in range(1, 5)] == [None, None, None, "語"]


def test_names_the_stop_string_that_starts_first(text_tokenizers: Any) -> None:
    tokenizer = text_tokenizers["byte_level"]
    matcher = StopMatcher(tokenizer, ("wer is", "answer", "s"))
    ids = tokenizer.encode("the answer is", add_special_tokens=False)
    assert matcher.find(ids) == "answer"


def test_few_tokens_are_suspects(text_tokenizers: Any) -> None:
    # The sieve is what makes stop strings cheap: most tokens must pass without being decoded.
    import numpy as np

    tokenizer = text_tokenizers["byte_level"]
    plain = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).isascii()]
    suspects = StopMatcher(tokenizer, (".\n\n",)).suspects(np.array(plain))
    assert suspects.mean() < 0.1


def test_text_of_empty_tokens_widens_the_window(text_tokenizers: Any) -> None:
    tokenizer = text_tokenizers["byte_fallback"]
    nothing = len(tokenizer) + 3  # decodes to no text at all
    ids = [
        *tokenizer.encode("the answ", add_special_tokens=False),
        *[nothing] * 60,
        *tokenizer.encode("er", add_special_tokens=False)[-1:],
    ]
    stop = tokenizer.decode(ids)[-4:]
    assert StopMatcher(tokenizer, (stop,)).find(ids) == stop


@pytest.mark.parametrize("silent", [0, 5, 200])
def test_a_long_last_token_does_not_push_the_start_of_the_stop_out_of_the_window(silent: int) -> None:
    # "ab" starts in one token and ends at the start of a long one, with tokens without text in between.
    words = {"x": 0, "a": 1, "b" + "c" * 40: 2, "<eos>": 3, "": 4}
    core = Tokenizer(models.WordLevel(words, "x"))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", clean_up_tokenization_spaces=False)
    ids = [*[0] * 30, 1, *[4] * silent, 2]
    assert tokenizer.decode(ids) == "x" * 30 + "ab" + "c" * 40
    matcher = StopMatcher(tokenizer, ("ab",))
    assert streamed_hit(matcher, ids) == len(ids)
