"""The generator of missing_start against brute force over all starts."""

import re

import pytest

from distill.data import DataConfigError, build_task, data_config

pytestmark = pytest.mark.unit


def make(split="train", **options):
    return build_task(data_config({"name": "missing_start", **options}), split)


def chain(start, terms, modulus):
    """Independent oracle: Python evaluates every prefix."""
    return [eval(f"({start}{''.join(terms[:n])}) % {modulus}") for n in range(len(terms) + 1)]


@pytest.mark.parametrize(
    "options", [{}, {"min_terms": 2, "max_terms": 6, "modulus": 10, "max_digits": 2}, {"operators": "-"}]
)
def test_one_candidate_fits_and_the_reference_shows_it(options):
    task = make(flawed=0.0, **options)
    modulus = task.config.modulus
    for index in range(300):
        example = task[index]
        low, high, operations, end = re.fullmatch(r"(\d)\|(\d)(.*)=(\d)\n", example.prompt).groups()
        terms = re.findall(r"[-+]\d+", operations)
        fitting = [start for start in range(modulus) if chain(start, terms, modulus)[-1] == int(end)]
        assert len(fitting) == 1
        assert low < high
        assert str(fitting[0]) in (low, high)
        values = chain(fitting[0], terms, modulus)
        assert example.reference.split("\n") == [f"={end}", *map(str, values), f"#{fitting[0]}"]
        assert example.answer == str(fitting[0])
        verdict = task.verify(example, example.reference)
        assert verdict.correct
        assert verdict.exact_chain


def test_neither_candidate_can_be_told_by_its_place():
    """The right one is the lower of the two in half of the problems: a model has to compute."""
    lower = sum(example.prompt[0] == example.answer for example in map(make(flawed=0.0).__getitem__, range(1600)))
    assert 700 < lower < 900


def test_a_flaw_is_the_chain_of_the_other_candidate():
    task = make(flawed=1.0)
    lengths = set()
    for index in range(300):
        example = task[index]
        low, high, operations = re.fullmatch(r"(\d)\|(\d)(.*)=\d\n", example.prompt).groups()
        _, *wrong = example.reference.split("\n!\n")[0].split("\n")
        other = high if example.answer == low else low
        values = chain(int(other), re.findall(r"[-+]\d+", operations), 5)
        assert wrong == [str(value) for value in values[: len(wrong)]]
        lengths.add(len(wrong))
    assert lengths == {2, 3}  # the choice and one or both of its results


@pytest.mark.parametrize(
    ("response", "correct", "exact"),
    [
        ("=3\n4\n3\n3\n#4", True, True),
        ("=3\n1\n0\n0\n!\n4\n3\n3\n#4", True, True),
        ("=3\n1\n0\n!\n4\n3\n3\n#4", True, True),
        ("=3\n1\n0\n0\n#1\n!\n4\n3\n3\n#4", True, True),
        ("=3\n1\n0\n0\n#4", True, False),
        ("=3\n1\n0\n0\n#1", False, False),
        ("=3\n4\n3\n3\n!\n1\n0\n0\n#1", False, False),
    ],
)
def test_verifier(response, correct, exact):
    task = make()
    assert task[5].prompt == "1|4-1-0=3\n"  # frozen: a change would silently train on other data after an upgrade
    verdict = task.verify(task[5], response)
    assert (verdict.correct, verdict.exact_chain) == (correct, exact)


def test_no_test_problem_is_ever_a_training_problem():
    train = {make(seed=s)[i].prompt for s in range(2) for i in range(2500)}
    test = {make("test", seed=s, test_size=600)[i].prompt for s in range(2) for i in range(600)}
    assert test
    assert not train & test


def test_alphabet_covers_every_example():
    task = make(modulus=10)
    assert set("".join(task[i].prompt + task[i].reference for i in range(400))) == set(task.alphabet)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modulus": None}, r"data\.modulus=None.*2 to 10"),
        ({"modulus": 11}, r"data\.modulus=11.*2 to 10"),
        ({"operators": "*"}, r"data\.operators.*several numbers"),
        ({"flawed": 1.5}, r"data\.flawed=1\.5.*0\.0 to 1\.0"),
        ({"min_carried": 3}, r"data\.min_carried=3.*max_carried=2"),
        ({"marker": "7"}, r"data\.marker='7'"),
        ({"marker": ""}, r"data\.marker=''"),
        ({"marker": "|"}, r"data\.marker='\|'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(DataConfigError, match=message):
        make(**options)
