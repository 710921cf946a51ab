"""Flawed spans in references, and how a response with markers is read: by hand-made cases and by a rewriting oracle."""

import pytest

from distill.data import build_task, data_config
from distill.data.flaws import standing

pytestmark = pytest.mark.unit


def make(split="train", **options):
    return build_task(data_config({"name": "running_sum", **options}), split)


def split_at_marker(lines):
    """(kept prefix and wrong lines, right lines behind the marker)."""
    place = lines.index("!")
    return lines[:place], lines[place + 1 :]


@pytest.mark.parametrize("name", ["running_sum", "missing_start"])
def test_a_flawed_reference_is_a_wrong_line_what_follows_from_it_the_marker_and_the_right_lines(name):
    task = make(name=name, flawed=1.0, min_carried=0, max_carried=3)
    spans = set()
    for index in range(300):
        example = task[index]
        right, lines = example.metadata["lines"], example.reference.split("\n")
        before, after = split_at_marker(lines)
        start = len(right) - len(after)
        assert after == right[start:]
        assert before[:start] == right[:start]
        assert before[start] != right[start]
        spans.add(len(before) - start)
        assert example.answer == right[-1].removeprefix("#")
        verdict = task.verify(example, example.reference)
        assert verdict.correct
        assert verdict.exact_chain
    assert spans >= {1, 2, 3}


def test_wrong_lines_follow_from_the_first_wrong_one():
    """Python's own arithmetic, from the wrong value on."""
    task = make(flawed=1.0, min_carried=2, max_carried=2, operators="+")
    for index in range(200):
        example = task[index]
        numbers = [int(n) for n in example.prompt.rstrip("=\n").split("+")]
        before, after = split_at_marker(example.reference.split("\n"))
        start = len(example.metadata["lines"]) - len(after)
        values = [int(line.removeprefix("#")) for line in before]
        for place in range(start + 1, min(len(before), 5)):
            assert values[place] == (values[place - 1] + numbers[place + 1]) % 10
        if before[-1].startswith("#"):
            assert values[-1] == values[-2]


def test_the_share_is_as_asked_and_test_references_have_none():
    marked = sum("!" in make(flawed=0.3)[i].reference for i in range(2000))
    assert 520 < marked < 680  # 600 ± 4 standard deviations
    assert not any("!" in make("test", flawed=1.0)[i].reference for i in range(200))


def test_flaws_change_neither_problems_nor_the_other_references():
    """A pure function of (seed, index), apart from the draw of the problem; and nothing changes where the share is 0."""
    plain, some = make(), make(flawed=0.5)
    for index in range(200):
        assert some[index].prompt == plain[index].prompt
        assert some[index].metadata["lines"] == plain[index].reference.split("\n")
        assert some[index] == make(flawed=0.5)[index]
        assert "!" in some[index].reference or some[index].reference == plain[index].reference
    assert "!" not in plain.alphabet
    assert "!" in some.alphabet


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        ("1 2 3 #3", "1 2 3 #3"),
        ("1 9 ! 2 3 #3", "1 2 3 #3"),
        ("1 9 8 #8 ! 2 3 #3", "1 2 3 #3"),
        ("9 ! 1 8 ! 2 3 #3", "1 2 3 #3"),
        ("1 9 ! 9 ! 2 3 #3", "1 2 3 #3"),
        ("1 2 ! 3 #3", "1 2 3 #3"),  # nothing wrong: nothing taken back
        ("1 9 ! 3 #3", "1 3 #3"),  # goes on behind the wrong line instead of with it
        ("1 9 ! 1 2 3 #3", "1 1 2 3 #3"),  # goes back further than the marker does
        ("1 2 3 #3 !", "1 2 3 #3"),
        ("1 2 3 #3 7 !", "1 2 3 #3"),
        ("! 1 2 3 #3", "1 2 3 #3"),
        ("1 9 !! 2", "1 9 !! 2"),
        ("!", ""),
        ("", ""),
    ],
)
def test_what_stands(lines, left):
    assert standing(lines.split(), "!", ["1", "2", "3", "#3"]) == left.split()


@pytest.mark.parametrize(
    ("response", "correct", "exact"),
    [
        ("7\n5\n5\n8\n9\n#9", True, True),
        ("7\n5\n4\n!\n5\n8\n9\n#9", True, True),
        ("7\n5\n5\n8\n8\n#8\n!\n9\n#9", True, True),
        ("7\n5\n4\n!\n8\n9\n#9", True, False),
        ("7\n5\n5\n8\n8\n#8\n#9", False, False),
        ("7\n5\n5\n8\n9\n#9\n!\n#8", False, False),
        ("7\n5\n5\n8\n9\n#9\n!\n#9", False, False),  # the first answer was right: it stands
        ("#8\n!\n#7\n!\n7\n5\n5\n8\n9\n#9", True, True),
        ("7\n5\n5\n8\n9\n9\n!", False, False),
        ("!\n!\n!", False, False),
        ("", False, False),
    ],
)
def test_the_verifier_reads_what_stands(response, correct, exact):
    task = make("train", flawed=0.5)
    verdict = task.verify(task[5], response)
    assert (verdict.correct, verdict.exact_chain) == (correct, exact)


def test_without_flaws_a_marker_is_just_a_wrong_line():
    task = make()
    assert task.verify(task[5], "7\n5\n5\n8\n8\n#8\n!\n9\n#9").correct is False
