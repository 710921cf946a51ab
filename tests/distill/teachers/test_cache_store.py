"""A cache on disk: what was written is read bit for bit, and what was cut short, changed or lost is named and made again."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import load
from safetensors import safe_open

from distill.config import TeacherSection
from distill.data import TokenSequence, collate
from distill.data.batch import TokenBatch
from distill.errors import CacheError, DataError
from distill.teachers.cache.folder import PartWriter
from distill.teachers.cache.index import read_index
from distill.teachers.cache.keys import batch_keys, key_of
from distill.teachers.cache.reader import CacheReader
from distill.teachers.cache.repair import recover
from distill.teachers.frozen import FrozenModel
from distill.teachers.signals import HiddenStates, bytes_per_token
from distill.teachers.wire import from_tensors, to_tensors

placements = load(Path(__file__).with_name("placements.py"), "placements")
pytestmark = pytest.mark.unit


def sequence(number: int, length: int = 9) -> TokenSequence:
    ids = [3 + (number * 7 + place * (number + 1)) % 12 for place in range(length + number % 4)]
    return TokenSequence([number + 3, *ids], 2, f"example/{number}")


BATCHES = [collate([sequence(i) for i in range(start, start + 3)], 0, None) for start in (0, 3, 6)]


@pytest.fixture(scope="module")
def teacher(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    path = make_model(tmp_path_factory.mktemp("teacher"), 3)
    return placements.teacher_of(placements.Case(path, "", 0, [], path))


def fill(
    path: Path, teacher: FrozenModel, kind: str = "topk", wire: str = "auto", batches: Sequence[TokenBatch] = BATCHES
) -> list[str]:
    return placements.fill_cache(path, teacher, kind, 5, batches, wire)


def content(path: Path) -> list[bytes]:
    """All bytes that a reader gives for all batches."""
    reader = CacheReader(path)
    found = [reader.read([k for k in batch_keys(batch) if k is not None]) for batch in BATCHES]
    reader.close()
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for one in found for tensor in one.values()]


@pytest.mark.parametrize(
    ("kind", "wire"),
    [("logits", "float32"), ("logits", "bfloat16"), ("hidden", "float32"), ("hidden", "bfloat16"), ("hidden", "float8"),
     ("topk", "auto"), ("sampled", "auto")],
)  # fmt: skip
def test_what_is_read_is_what_was_said(kind: str, wire: str, teacher: FrozenModel, tmp_path: Path) -> None:
    fill(tmp_path / "cache", teacher, kind, wire)
    reader = CacheReader(tmp_path / "cache")
    contents = reader.index.contents
    tokens = 0
    for batch in BATCHES:
        said = to_tensors(teacher.signal(batch, kind, 5), contents.dtype)
        read = reader.read([k for k in batch_keys(batch) if k is not None])
        assert said.keys() == read.keys()
        assert all(torch.equal(said[name], read[name]) for name in said)
        tokens += len(batch.target_ids)
        for key, count in (k for k in reversed(batch_keys(batch)) if k is not None):  # in any order, one by one
            assert len(next(iter(reader.read([(key, count)]).values()))) == count
    assert len(reader) == 9
    (shard,) = reader.index.shards
    path = tmp_path / "cache" / "shards" / shard.file
    assert (shard.tokens, shard.sequences, shard.bytes) == (tokens, 9, path.stat().st_size)
    assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    per_token = bytes_per_token(kind, contents.dtype, 16, contents.vocabulary, 5)
    assert contents.token_bytes == per_token
    with safe_open(path, "pt") as file:  # the format's own library is the judge of the file
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert sum(tensor.nbytes for tensor in tensors.values()) == tokens * per_token
    first, count = next(k for k in batch_keys(BATCHES[0]) if k is not None)
    mine = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(first.hex())}
    read = reader.read([(first, count)])
    assert all(torch.equal(mine[name].view(torch.uint8), read[name].view(torch.uint8)) for name in read)
    if kind == "hidden":
        ours, theirs = reader.head(), teacher.head
        assert torch.equal(ours.weight, theirs.weight)
        assert (ours.bias, ours.scale, ours.softcap) == (theirs.bias, theirs.scale, theirs.softcap)
    assert len(reader.read([])[next(iter(mine))]) == 0
    with pytest.raises(KeyError):
        reader.read([(b"0" * 16, 3)])


def test_float8_keeps_three_bits_of_every_row(teacher: FrozenModel) -> None:
    hidden = torch.randn(50, 16) * torch.logspace(-6, 6, 50)[:, None]
    hidden[7] = 0.0
    again = from_tensors("hidden", to_tensors(HiddenStates(hidden, teacher.head), torch.float8_e4m3fn), teacher.head)
    assert isinstance(again, HiddenStates)
    worst = (again.hidden - hidden).abs() / hidden.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    assert worst.max() <= 2**-4
    assert not again.hidden[7].any()


def test_a_key_is_what_the_teacher_read_and_nothing_else() -> None:
    def key(ids: list[int], prompt: int, flags: list[bool] | None = None, **other: object) -> bytes | None:
        one = TokenSequence(ids, prompt, str(other), flags)
        neighbours = [TokenSequence([9, 9, 9], 1, "n"), one, TokenSequence([8] * 12, 3, "m")]
        found = {batch_keys(collate(neighbours, 0, length))[1] for length in (None, 12, 40)} | {
            batch_keys(collate([one], 0, None))[0]
        }
        assert len(found) == 1, "the same in any layout and company"
        return (found.pop() or (None,))[0]

    base = key([5, 6, 7, 8], 2)
    places = np.array([2, 3])
    assert base == key_of(np.array([5, 6, 7, 8]), places) == key([5, 6, 7, 8], 2, [True, True], example="other")
    # What comes behind the last supervised token is not read for it; everything before is.
    assert base == key([5, 6, 7, 8, 9], 2, [True, True, False])
    others = [
        key([5, 6, 7, 9], 2),
        key([4, 6, 7, 8], 2),
        key([5, 6, 7, 8], 1),
        key([5, 6, 7, 8], 2, [False, True]),
        key([5, 6, 7, 8, 9], 2),
    ]
    assert len({base, *others}) == 6
    assert key([5, 6, 7], 2, [False]) is None


def test_a_kill_at_any_byte_loses_at_most_the_sequence_that_was_being_written(
    teacher: FrozenModel, tmp_path: Path
) -> None:
    fill(tmp_path / "whole", teacher)
    expected = content(tmp_path / "whole")
    # A run that stops after two of three batches, its files as a kill leaves them.
    killed = tmp_path / "killed"
    fill(killed, teacher, batches=[])
    writer = PartWriter(killed, 2, read_index(killed).contents)
    for batch in BATCHES[:2]:
        writer.add_batch(batch, teacher.signal(batch, "topk", 5))
    writer.close()
    shards = killed / "shards"
    data, journal = ((shards / f"rank_00002_000000.{kind}").read_bytes() for kind in ("part", "journal"))
    lines = journal.splitlines(keepends=True)
    assert len(lines) == 6
    sizes = [json.loads(line)["tokens"] * 8 * 5 for line in lines]
    start = len(data) - sum(sizes)
    cases = [(len(data), cut) for cut in range(0, len(journal) + 1, 61)]
    cases += [(cut, len(journal)) for cut in [0, 5, *range(start - 9, len(data), 701)]]
    for data_cut, journal_cut in cases:
        shutil.rmtree(tmp_path / "case", ignore_errors=True)
        shutil.copytree(killed, tmp_path / "case")
        case = tmp_path / "case" / "shards"
        (case / "rank_00002_000000.part").write_bytes(data[:data_cut])
        (case / "rank_00002_000000.journal").write_bytes(journal[:journal_cut])
        whole = sum(
            sum(sizes[: i + 1]) + start <= data_cut and len(b"".join(lines[: i + 1])) <= journal_cut for i in range(6)
        )
        fill(tmp_path / "case", teacher, batches=[])
        assert sum(shard.sequences for shard in read_index(tmp_path / "case").shards) == whole
        assert {path.suffix for path in case.iterdir()} <= {".safetensors"}
    fill(tmp_path / "case", teacher)
    assert content(tmp_path / "case") == expected
    # Where the power went, a line may be there before its data.
    spoilt = bytearray(data)
    spoilt[start + sum(sizes[:3]) + 4] ^= 1
    (shards / "rank_00002_000000.part").write_bytes(spoilt)
    path, contents = shards / "rank_00002_000000.safetensors", read_index(killed).contents
    once = recover(path, contents.layout, contents.json())
    assert once == recover(path, contents.layout, contents.json()), "a kill right after it changes nothing"
    fill(killed, teacher, batches=[])
    assert [shard.sequences for shard in read_index(killed).shards] == [3]


def test_a_sealed_shard_that_no_index_lists_yet_is_taken_over(teacher: FrozenModel, tmp_path: Path) -> None:
    fill(tmp_path, teacher, batches=[])
    writer = PartWriter(tmp_path, 0, read_index(tmp_path).contents, limit=1)  # a shard per sequence
    for batch in BATCHES:
        writer.add_batch(batch, teacher.signal(batch, "topk", 5))
    assert len(list((tmp_path / "shards").glob("*.journal"))) == 9  # killed before the index was written
    (tmp_path / "shards" / "rank_00000_000003.safetensors").rename(tmp_path / "shards" / "rank_00000_000003.part")
    spoilt = tmp_path / "shards" / "rank_00000_000005.safetensors"
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"\0\0")
    (note,) = fill(tmp_path, teacher, batches=[])
    assert str(spoilt) in note
    assert "scored again" in note
    assert len(read_index(tmp_path).shards) == 8
    assert not list((tmp_path / "shards").glob("*.journal"))
    fill(tmp_path, teacher)
    assert len(content(tmp_path)) == 6


@pytest.mark.parametrize("how", ["flipped", "short", "gone", "header"])
def test_a_damaged_shard_is_named_by_the_reader_and_made_again_by_the_writer(
    how: str, teacher: FrozenModel, tmp_path: Path
) -> None:
    fill(tmp_path, teacher)
    expected = content(tmp_path)
    path = tmp_path / "shards" / read_index(tmp_path).shards[0].file
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    else:
        place = {"flipped": len(data) - 5, "header": 40, "short": 0}[how]
        data[place] ^= how != "short"
        path.write_bytes(data[:-1] if how == "short" else data)
    with pytest.raises(
        CacheError, match=rf"{path.name} is damaged: .*; score its sequences again: distill rollout --save"
    ):
        content(tmp_path)
    folder = placements.CacheFolder(tmp_path, lambda line: notes.append(line))
    notes: list[str] = []
    index = read_index(tmp_path)
    contents = index.contents
    folder.enter(contents, None, placements.char_tokenizer("0"), "distill rollout --save")
    folder.drop([(shard, folder.damage(shard)) for shard in index.shards])
    folder.leave()
    assert len(notes) == 1
    assert str(path) in notes[0]
    assert "its 9 sequences" in notes[0]
    assert not path.exists()
    fill(tmp_path, teacher)
    assert content(tmp_path) == expected


def test_a_damaged_index_is_made_anew_from_its_own_shards_only(teacher: FrozenModel, tmp_path: Path) -> None:
    fill(tmp_path, teacher)
    expected = content(tmp_path)
    for text in ("", "{", "[]", (tmp_path / "index.json").read_text().replace("topk", "tpok")):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(CacheError, match=r"index\.json is damaged .*--save again"):
            CacheReader(tmp_path)
        (note,) = fill(tmp_path, teacher, batches=[])
        assert "made anew from the shards" in note
        assert content(tmp_path) == expected
    (tmp_path / "index.json").unlink()
    with pytest.raises(CacheError, match=r"holds no index\.json; fill it: distill rollout"):
        CacheReader(tmp_path)
    with pytest.raises(CacheError, match=r"safetensors holds signal=topk, and this run would add signal=hidden"):
        fill(tmp_path, teacher, "hidden", batches=[])
    assert list((tmp_path / "shards").glob("*.safetensors")), "what belongs to another cache is not touched"
    assert not (tmp_path / "index.json").exists()


def test_another_teacher_or_form_is_refused(
    teacher: FrozenModel, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    fill(tmp_path / "cache", teacher, "hidden", "bfloat16")
    contents = read_index(tmp_path / "cache").contents
    other = placements.Case(make_model(tmp_path / "other", 4), "", 0, [], tmp_path)
    with pytest.raises(
        CacheError,
        match=r"index\.json holds fingerprint=.*; set model\.teacher\.path and model\.teacher_dtype as it was",
    ):
        fill(tmp_path / "cache", placements.teacher_of(other), "hidden", "bfloat16")
    with pytest.raises(
        CacheError, match=r"holds wire=bfloat16, and this run would add wire=float32; set teacher\.wire"
    ):
        fill(tmp_path / "cache", teacher, "hidden", "float32")
    for section, words in (
        (
            TeacherSection(signal="topk"),
            "teacher.signal=topk is not what index was made with; set teacher.signal=hidden",
        ),
        (
            TeacherSection(signal="hidden", wire="float32"),
            "teacher.wire=float32 is not what index was made with; set teacher.wire=bfloat16",
        ),
    ):
        with pytest.raises(CacheError, match=words.replace(".", r"\.")):
            contents.check_run(section, Path("index"))
    contents.check_run(TeacherSection(signal="hidden"), Path("index"))
    head = tmp_path / "cache" / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1] + b"\1")
    with pytest.raises(CacheError, match=r"head\.safetensors: does not have the checksum"):
        CacheReader(tmp_path / "cache").head()
    fill(tmp_path / "cache", teacher, "hidden", "bfloat16", batches=[])
    assert torch.equal(CacheReader(tmp_path / "cache").head().weight, teacher.head.weight)


def test_a_full_disk_is_one_message_and_loses_nothing(teacher: FrozenModel, tmp_path: Path) -> None:
    fill(tmp_path, teacher, "logits", batches=BATCHES[:1])
    size = (tmp_path / "shards" / read_index(tmp_path).shards[0].file).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = PartWriter(tmp_path, 0, read_index(tmp_path).contents)
    writer.add_batch(BATCHES[0], teacher.signal(BATCHES[0], "logits", 5))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 700, before[1]))
        with pytest.raises(
            CacheError, match=r"rank_00000_000001\.part could not be written \(File too large\); free some space"
        ):
            writer.add_batch(BATCHES[1], teacher.signal(BATCHES[1], "logits", 5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    writer.close()
    fill(tmp_path, teacher, "logits", batches=BATCHES[1:])
    assert len(content(tmp_path)) == 3


def test_what_is_not_a_number_is_not_kept(teacher: FrozenModel, tmp_path: Path) -> None:
    fill(tmp_path, teacher, "hidden", batches=[])
    writer = PartWriter(tmp_path, 0, read_index(tmp_path).contents)
    signal = teacher.signal(BATCHES[0], "hidden", 5)
    assert isinstance(signal, HiddenStates)
    signal.hidden[-1, 3] = torch.nan
    with pytest.raises(DataError, match=r"example example/2: what the teacher says is not a number"):
        writer.add_batch(BATCHES[0], signal)
    writer.close()
