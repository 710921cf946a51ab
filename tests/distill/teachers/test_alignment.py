"""Two tokenizers of one text: groups against brute force, what the teacher says against the teacher itself, and odd texts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, product
from pathlib import Path

import pytest
import torch
from harness import load
from torch import Tensor
from transformers import PreTrainedModel

from distill.data import TokenSequence, collate
from distill.data.batch import TokenBatch
from distill.data.tokenize import TooLong, encode_response
from distill.errors import DataError, ModelError
from distill.models import build_model
from distill.teachers.aligned import Aligned, Aligner, check_texts, group_shares
from distill.teachers.alignment import NONE, Alignment, align, readable
from distill.teachers.colocated import Colocated
from distill.teachers.frozen import FrozenModel
from distill.teachers.signals import SampledToken, TopK
from distill.teachers.spelling import Spelling

pytestmark = pytest.mark.unit
foreign = load(Path(__file__).with_name("foreign.py"), "foreign")

PAIRS = [pair for pair in product(foreign.FAMILIES, repeat=2) if pair[0] != pair[1]]
PROMPT = "12 + 30 ="


@cache
def aligner(student: str, teacher: str) -> Aligner:
    return Aligner(foreign.tokenizer(student), foreign.tokenizer(teacher), teacher)


@cache
def model(family: str) -> PreTrainedModel:
    torch.manual_seed(5)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    shape = {"model_type": "qwen3", **sizes, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.5}
    return build_model(shape, foreign.tokenizer(family), "sdpa")


def response(family: str, draw: random.Random, ended: bool = True) -> list[int]:
    """A random text that its tokenizer takes, canonical or not."""
    text = foreign.random_text(draw)
    canonical = list(foreign.tokenizer(family)(text, add_special_tokens=False)["input_ids"])
    ids = canonical if draw.random() < 0.5 else foreign.random_ids(family, text, draw)
    return [*ids, foreign.tokenizer(family).eos_token_id] if ended else ids


def sequences(family: str, seed: int, count: int = 4) -> list[TokenSequence]:
    """Written by a student, one of them cut off, one with a token that is not supervised."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        ids = response(family, draw, ended=number != 1)
        flags = [draw.random() < 0.8 for _ in ids] if number == 2 else None
        logprobs = None if number == 3 else [-draw.expovariate(1.0) for _ in ids]
        prompt = foreign.tokenizer(family)(PROMPT, add_special_tokens=False)["input_ids"]
        made.append(TokenSequence([*prompt, *ids], len(prompt), f"s{number}", flags, logprobs, prompt=PROMPT))
    return made


def scored(
    student: str, teacher: str, kind: str, batch: TokenBatch, top_k: int = 300
) -> tuple[SampledToken | TopK, Aligned]:
    scorer = Aligned(Colocated(FrozenModel(model(teacher)), kind, top_k), aligner(student, teacher), 0.0)
    scorer.submit([batch])
    signal = scorer.take(batch)
    assert isinstance(signal, SampledToken | TopK)
    return signal, scorer


def teachers_view(teacher: str, text: str, ended: bool) -> tuple[list[int], Tensor]:
    """Its own tokens of a response, and its log-probabilities ``[n, V]`` there, straight from the model."""
    tokens = foreign.tokenizer(teacher)
    prompt = tokens(PROMPT)["input_ids"]
    ids = tokens(text, add_special_tokens=False)["input_ids"] if text else []
    ids = [*ids, tokens.eos_token_id] if ended else ids
    with torch.no_grad():
        logits = model(teacher)(torch.tensor([[*prompt, *ids]])).logits[0].double()
    return ids, logits.log_softmax(-1)[len(prompt) - 1 : -1]


# ---------------------------------------------------------------- spelling and groups


@pytest.mark.parametrize("family", foreign.FAMILIES)
def test_tokens_spell_the_text(family: str) -> None:
    tokens, spelling, draw = foreign.tokenizer(family), foreign.spellings(family), random.Random(1)
    for text in [*foreign.TEXTS, *(foreign.random_text(draw) for _ in range(100))]:
        ids = tokens(text, add_special_tokens=False)["input_ids"]
        spelled = b"".join(piece or b"" for piece in spelling.of(ids))
        assert spelled.decode() == tokens.decode(ids)
        assert spelled in (
            text.encode(),
            text[1:].encode() if text[:1] == " " else b"-",
        )  # Metaspace takes a first space for its own


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_groups_are_the_smallest_that_cover_the_same_bytes(pair: tuple[str, str]) -> None:
    draw = random.Random(2)
    for _ in range(60):
        ended = draw.random() < 0.5
        ids = response(pair[0], draw, ended)
        made = aligner(*pair).align(ids)
        pieces = [piece or b"" for piece in foreign.spellings(pair[0]).of(ids)]
        text = b"".join(pieces).decode()
        theirs = [foreign.spellings(pair[1])[token] or b"" for token in made.teacher_ids]
        spelled = b"".join(theirs).decode()
        assert spelled.removeprefix(" ") == text or spelled == text
        surplus = len(spelled.encode()) - len(text.encode())
        assert made.shifted == bool(surplus)
        # Brute force: both sides' boundaries in the text, cuts where they meet, a group per cut.
        ours = list(accumulate(map(len, pieces)))
        others = [max(end - surplus, 0) for end in accumulate(map(len, theirs))]
        tokens = (len(ours) - ended, len(others) - ended)
        cuts = [c for c in sorted(set(ours)) if c and c in ours[: tokens[0]] and c in others[: tokens[1]]]
        expected = [[sum(c < end for c in cuts) for end in ends[:count]] for ends, count in zip((ours, others), tokens)]
        assert [made.student[: tokens[0]], made.teacher[: tokens[1]]] == expected
        if ended:
            assert made.student[-1] == made.teacher[-1] == len(cuts)
        assert made.aligned_bytes == sum(made.sizes)


# ---------------------------------------------------------------- what the teacher says


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("packed", [False, True])
def test_sampled_sums_to_the_teachers_log_probability_of_the_text(pair: tuple[str, str], packed: bool) -> None:
    made = sequences(pair[0], 3)
    batch = collate(made, 0, max(len(s.ids) for s in made) if packed else None)
    signal, _ = scored(*pair, "sampled", batch)
    assert isinstance(signal, SampledToken)
    assert signal.known is not None
    assert signal.known.all()
    for number in (0, 1, 3):  # wholly supervised
        mine = signal.logprobs[batch.sequence_index == number].double()
        text = foreign.tokenizer(pair[0]).decode(made[number].response_ids, skip_special_tokens=True)
        ids, logprobs = teachers_view(pair[1], text, ended=number != 1)
        expected = logprobs.gather(1, torch.tensor(ids)[:, None]).sum()
        assert len(mine) == len(made[number].response_ids)
        torch.testing.assert_close(mine.sum(), expected, rtol=1e-5, atol=1e-5)


def test_a_group_that_both_give_the_same_probability_pushes_no_token() -> None:
    alignment = Alignment([0, 0, 1], [0, 1, 1], [5, 6, 7], [1, 3, 2], False)
    written = torch.tensor([-0.5, -0.01, -2.0]).double()
    shares = group_shares(alignment, written.tolist())
    groups = torch.tensor([-0.51, -2.0]).double()  # the teacher's, equal to the student's
    torch.testing.assert_close(groups[[0, 0, 1]] * shares, written)
    torch.testing.assert_close(group_shares(alignment, None), torch.tensor([0.25, 0.75, 1.0]).double())
    assert group_shares(alignment, [0.0, 0.0, 0.0]).isfinite().all()


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("top_k", [5, 10_000])
def test_topk_is_the_teachers_mass_at_tokens_of_the_same_spelling(pair: tuple[str, str], top_k: int) -> None:
    made = sequences(pair[0], 4)
    batch = collate(made, 0, None)
    signal, scorer = scored(*pair, "topk", batch, top_k)
    assert isinstance(signal, TopK)
    row, share = 0, 0.0
    for sequence in made:
        found = expected_lists(pair, sequence, top_k)
        flags = sequence.supervised or [True] * len(found)
        for expected in (one for one, flag in zip(found, flags, strict=True) if flag):
            kept = signal.ids[row] >= 0
            masses = zip(signal.ids[row][kept].tolist(), signal.logprobs[row][kept].exp().tolist(), strict=True)
            listed: dict[bytes, float] = {}
            for token, mass in masses:
                piece = spelled_at(pair[0], token, row_is_start(batch, row))
                assert piece not in listed, "each outcome once"
                listed[piece] = mass
            assert listed.keys() == expected[0].keys()
            assert all(math.isclose(listed[piece], expected[0][piece], rel_tol=1e-4, abs_tol=1e-9) for piece in listed)
            assert (signal.logprobs[row][~kept] == -torch.inf).all()
            row, share = row + 1, share + sum(expected[0].values()) / (expected[1] or 1.0)
    assert row == len(signal) == len(batch.target_ids)
    assert math.isclose(scorer._step[0], share, rel_tol=1e-5)


def row_is_start(batch: TokenBatch, row: int) -> bool:
    sequence = batch.sequences[int(batch.sequence_index[row])]
    return int(batch.target_index[row, 1]) + 1 == sequence.prompt_length


def spelled_at(family: str, token: int, start: bool) -> bytes:
    spelling = foreign.spellings(family)
    if token == spelling.end:
        return b"END"
    piece = spelling[token]
    assert piece
    return piece.removeprefix(b" ") if start and spelling.lead else piece


def expected_lists(
    pair: tuple[str, str], sequence: TokenSequence, top_k: int
) -> list[tuple[dict[bytes, float], float]]:
    """Per student token: spelling → mass of the teacher's top-k there, of spellings that the student has; and all listed mass."""
    ours, theirs = foreign.spellings(pair[0]), foreign.spellings(pair[1])
    ids = sequence.response_ids
    text = b"".join(piece or b"" for piece in ours.of(ids)).decode()
    others, logprobs = teachers_view(pair[1], text, ids[-1] == ours.end)
    spelled = [theirs[token] or b"" for token in others]
    surplus = len(b"".join(spelled)) - len(text.encode())
    begins = [max(x - surplus, 0) for x in accumulate(map(len, spelled), initial=0)]
    lists: list[tuple[dict[bytes, float], float]] = []
    begin, begun = 0, -1
    for place, token in enumerate(ids):
        start = place == 0
        vocabulary = {spelled_at(pair[0], t, start) for t in range(len(ours)) if ours[t] or t == ours.end} - {b""}
        where = [
            k for k in range(len(others)) if begins[k] == begin and (token == ours.end) == (others[k] == theirs.end)
        ]
        found: dict[bytes, float] = {}
        total = 0.0
        if where and begin != begun:
            mass, tokens = logprobs[where[0]].exp().topk(min(top_k, logprobs.shape[1]))
            for m, t in zip(mass.tolist(), tokens.tolist(), strict=True):
                piece = b"END" if t == theirs.end else theirs[t] or b""
                if start and (theirs.lead or surplus):
                    piece = piece.removeprefix(b" ")
                total += m
                if piece in vocabulary:
                    found[piece] = found.get(piece, 0.0) + m
        lists.append((found, total))
        begun = begin
        begin += len(ours.of(ids)[place] or b"")
    return lists


# ---------------------------------------------------------------- odd texts


def groups(student: str, teacher: str, ids: Sequence[int]) -> Alignment:
    return aligner(student, teacher).align(ids)


def test_a_character_cut_between_tokens_is_one_group() -> None:
    spelling = foreign.spellings("bytes")
    single = {spelling[t]: t for t in range(len(spelling)) if spelling[t] and len(spelling[t] or b"") == 1}
    ids = [single[bytes([byte])] for byte in "a🙂b".encode()]
    made = groups("bytes", "characters", ids)
    assert made.student == [0, 1, 1, 1, 1, 2]
    cut = groups("bytes", "characters", ids[:3])  # the model stopped in the middle of it
    assert cut.student == [0, NONE, NONE]
    assert cut.aligned_bytes == 1
    wrong = groups("bytes", "pieces", [ids[0], ids[2], ids[5]])  # a byte that is no UTF-8, between good ones
    assert wrong.student == [0, NONE, 2]


def test_readable_text_of_any_bytes() -> None:
    draw = random.Random(7)
    for _ in range(200):
        raw = bytes(draw.choice((draw.randrange(256), *"aé日🙂".encode())) for _ in range(12))
        text, places, bad = readable(raw)
        assert len(places) == len(raw) + 1
        assert places[-1] == len(text.encode()) or bad[-1][1] == places[-1] > len(text.encode())
        assert not text.endswith("\ufffd")
        good = [i for i in range(len(raw)) if not any(first <= places[i] < last for first, last in bad)]
        assert bytes(raw[i] for i in good) == b"".join(text.encode()[places[i] : places[i + 1]] for i in good)
        assert (
            raw.decode(errors="ignore")
            == "".join(raw[i : i + 1].decode("latin1") for i in good).encode("latin1").decode()
        )


def test_ends_and_special_tokens() -> None:
    student, end = foreign.tokenizer("bytes"), foreign.tokenizer("bytes").eos_token_id
    hello = student("Hello", add_special_tokens=False)["input_ids"]
    made = groups("bytes", "pieces", [*hello, end, *hello, end])  # an end in the middle is no text
    assert made.student[len(hello)] == NONE
    assert made.student[-1] == made.teacher[-1] == max(made.student)
    assert made.teacher_ids[-1] == foreign.tokenizer("pieces").eos_token_id
    assert made.aligned_bytes == 2 * 5 + 1
    assert groups("bytes", "pieces", [end]).student == [0]
    assert groups("bytes", "pieces", []).student == []
    written = student("a </s> b", add_special_tokens=False)["input_ids"]  # text that looks like the teacher's end
    assert foreign.tokenizer("pieces").eos_token_id not in groups("bytes", "pieces", written).teacher_ids


@pytest.mark.parametrize("text", ["xﬁx yes", "ﬁ", "yes ﬁ", "ﬁ yes", "x ﬁ and ﬁ yes"])
def test_what_a_normaliser_changes_has_no_counterpart(text: str) -> None:
    """NFKC writes the ligature as two letters."""
    made = groups("bytes", "metaspace", foreign.tokenizer("bytes")(text, add_special_tokens=False)["input_ids"])
    pieces = foreign.spellings("bytes").of(foreign.tokenizer("bytes")(text, add_special_tokens=False)["input_ids"])
    ends = list(accumulate(len(piece or b"") for piece in pieces))
    first, last = text.encode().find("ﬁ".encode()), text.encode().rfind("ﬁ".encode()) + 3
    for group, end, piece in zip(made.student, ends, pieces, strict=True):
        if end > first and end - len(piece or b"") < last:
            assert group == NONE
    assert made.aligned_bytes >= (3 if "yes" in text else 0)


def test_a_text_that_the_teacher_cannot_encode_is_not_aligned() -> None:
    ids = [
        *foreign.tokenizer("bytes")("Hello ß", add_special_tokens=False)["input_ids"],
        foreign.tokenizer("bytes").eos_token_id,
    ]
    made = groups("bytes", "characters", ids)
    assert {*made.student[:-1]} == {NONE}
    assert made.student[-1] == 0
    assert made.teacher == [0]


def test_each_model_reads_the_prompt_in_its_own_template() -> None:
    teacher = foreign.tokenizer("pieces")
    before = teacher.chat_template
    try:
        teacher.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
        sequence = TokenSequence([3, 4, 5], 1, "chat", prompt=[{"role": "user", "content": "Hello"}])
        read = aligner("bytes", "pieces").read(sequence, aligner("bytes", "pieces").align([4, 5]))
        assert teacher.decode(read.ids[: read.prompt_length]) == "<user>Hello<answer>"
        short = Aligner(foreign.tokenizer("bytes"), teacher, "math", context=3)
        with pytest.raises(TooLong, match=r"example chat: math's tokenizer makes .* the limit is 3"):
            short.read(sequence, short.align([4, 5]))
    finally:
        teacher.chat_template = before


def test_a_tokenizer_without_bytes_is_refused() -> None:
    import copy

    from tokenizers import decoders
    from transformers import PreTrainedTokenizerFast

    backend = copy.deepcopy(foreign.tokenizer("characters").backend_tokenizer)
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="math's tokenizer puts texts together by WordPiece"):
        Spelling(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"), "math")


# ---------------------------------------------------------------- shares


def test_too_small_a_share_is_refused_with_examples() -> None:
    pair = aligner("bytes", "characters")
    student = foreign.tokenizer("bytes")
    check_texts(pair, student, ["Hello", "they were"], 1.0)
    with pytest.raises(
        DataError, match=r"only 50\.0% of what characters says .*min_share=0\.9.*'<Good>'.*Choose a teacher"
    ) as caught:
        check_texts(pair, student, ["Hello.", "<Good>", "<Kind>", "others"], 0.9)
    assert caught.value.on_every_rank
    assert "'<Kind>'" in str(caught.value)
    check_texts(pair, student, ["Hello.", "<Good>"], 0.5)


def test_the_share_of_a_run_counts_bytes_and_comes_with_the_figures() -> None:
    student = foreign.tokenizer("bytes")
    texts = ["Hello", "ßß"]
    made = [TokenSequence([5, *encode_response(student, text)], 1, text, prompt="12") for text in texts]
    batch = collate(made, 0, None)
    signal, scorer = scored("bytes", "characters", "sampled", batch)
    assert isinstance(signal, SampledToken)
    assert signal.known is not None
    assert (~signal.known).sum() == len(made[1].response_ids) - 1  # its end is known
    assert (signal.logprobs[~signal.known] == 0).all()
    share = (5 + 1 + 1) / (5 + 1 + 4 + 1)
    assert (scorer._step[0] / scorer._step[1]) == pytest.approx(share)


def test_an_empty_batch_is_asked_about_too() -> None:
    for kind in ("sampled", "topk"):
        signal, _ = scored("bytes", "pieces", kind, collate([], 0, None))
        assert len(signal) == 0


def test_align_of_nothing() -> None:
    spelling = foreign.spellings("bytes")
    assert align(spelling, [], spelling, lambda text: []) == Alignment([], [], [], [], False)
