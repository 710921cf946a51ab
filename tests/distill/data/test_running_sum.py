"""The generator and the verifiers of running_sum, against an evaluator of our own."""

import re
from itertools import pairwise

import pytest

from distill.data import build_task, data_config

pytestmark = pytest.mark.unit


def make(split="train", **options):
    return build_task(data_config({"name": "running_sum", **options}), split)


def evaluate(prompt, modulus):
    """Independent oracle: parse the text and fold it with Python's own operators."""
    numbers = [int(n) for n in re.findall(r"\d+", prompt)]
    signs = re.findall(r"[-+*]", prompt)
    total, results = numbers[0], []
    for sign, number in zip(signs, numbers[1:]):
        total = eval(f"{total} {sign} {number}")
        total = total % modulus if modulus else total
        results.append(str(total))
    return results


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_terms": 2, "max_terms": 9, "min_digits": 1, "max_digits": 3, "modulus": 16, "operators": "+-*"},
        {"min_terms": 3, "max_terms": 5, "max_digits": 2, "modulus": None},
    ],
)
def test_references_are_right_and_verify(options):
    task = make(**options)
    for index in range(200):
        example = task[index]
        chain = evaluate(example.prompt, task.config.modulus)
        assert example.prompt.endswith("=\n")
        assert example.reference == "\n".join([*chain, "#" + chain[-1]])
        verdict = task.verify(example, example.reference)
        assert verdict.correct
        assert verdict.exact_chain


def test_options_are_obeyed_over_their_whole_range():
    task = make(min_terms=2, max_terms=4, min_digits=1, max_digits=2)
    numbers = [re.findall(r"\d+", task[i].prompt) for i in range(600)]
    assert {len(n) for n in numbers} == {2, 3, 4}
    assert {len(n) for each in numbers for n in each} == {1, 2}
    assert {int(n) for each in numbers for n in each} == set(range(100))


def test_an_example_is_a_pure_function_of_seed_split_and_index():
    """Frozen text: a change would silently train on other data after an upgrade."""
    assert make()[5] == make()[5] == make(train_size=10)[5]
    assert make()[5].prompt == "4-7+8-0-7+1=\n"
    assert make(seed=1)[5].prompt != make()[5].prompt
    assert len({make()[i].prompt for i in range(500)}) > 495


def test_no_test_problem_is_ever_a_training_problem():
    """A space small enough to exhaust, with several seeds: 10³·2² = 4000 problems."""
    options = {"min_terms": 3, "max_terms": 3}
    train = {make(seed=s, **options)[i].prompt for s in range(2) for i in range(8000)}
    test = {make("test", seed=s, test_size=2000, **options)[i].prompt for s in range(2) for i in range(2000)}
    assert len(train) > 3400
    assert 300 < len(test) < 500
    assert not train & test


@pytest.mark.parametrize(
    ("response", "correct", "exact"),
    [
        ("7\n5\n5\n8\n9\n#9", True, True),
        ("7\n5\n5\n8\n9\n#9<eos>", True, True),
        ("7\n5\n5\n8\n9\n#9 <|im_end|>\n<pad><pad>", True, True),
        ("  7\n5\n5\n8\n9\n#9\n\n", True, True),
        ("7\n5\n5\n8\n9\n#09", True, True),
        ("7\n5\n5\n7\n9\n#9", True, False),
        ("#9", True, False),
        ("7\n5\n5\n8\n9\n9\n#9", True, False),
        ("7\n5\n5\n8\n9\n#8", False, False),
        ("7\n5\n5\n8\n9\n#9\n#9", False, False),
        ("#8\n#9", False, False),
        ("7\n5\n5\n8\n9\n#9\n5", False, False),
        ("7\n5\n5\n8\n9\n#9<eos>7", False, False),
        ("7\n5\n5\n8\n9\n9", False, False),
        ("7\n5\n5\n8\n9\n#", False, False),
        ("7\n5\n5\n8\n9\n#9#9", False, False),
        ("7\n5\n5\n8\n9\n#٩", False, False),  # an Arabic-Indic nine
        ("#" + "9" * 10_000, False, False),
        ("", False, False),
        ("<eos>" * 5000 + " " * 50_000 + "x", False, False),
    ],
)
def test_verifier(response, correct, exact):
    task = make()
    verdict = task.verify(task[5], response)
    assert (verdict.correct, verdict.exact_chain) == (correct, exact)


def test_negative_results_without_modulus():
    task = make(min_terms=2, max_terms=2, modulus=None, operators="-")
    example = next(task[i] for i in range(50) if task[i].answer.startswith("-"))
    assert task.verify(example, example.reference).correct
    assert not task.verify(example, example.reference.replace("#-", "#")).correct


def test_sizes_are_virtual_and_indices_checked():
    task = make(train_size=10**18)
    assert len(task) == 10**18
    assert task[10**18 - 1].id == f"running_sum/train/{10**18 - 1}"
    for index in (-1, 10**18):
        with pytest.raises(IndexError, match="running_sum/train"):
            task[index]


def test_alphabet_covers_every_example():
    task = make(operators="+*", modulus=7, max_digits=3)
    text = "".join(task[i].prompt + task[i].reference for i in range(200))
    assert set(text) == set(task.alphabet)


def test_a_mark_asks_for_a_brief_answer():
    task = make(brief=0.5, restated=0.8, restated_brief=0.1)
    counts = {True: [0, 0], False: [0, 0]}  # marked or not: problems, restated results
    for index in range(400):
        example, plain = task[index], make()[index]
        lines, spoken = plain.reference.split("\n"), example.reference.split("\n")
        counts[example.prompt.startswith("~")][0] += 1
        counts[example.prompt.startswith("~")][1] += len(spoken) - len(lines)
        assert example.prompt.removeprefix("~") == plain.prompt
        assert [line for line in spoken if not line.startswith("=")] == lines
        assert all(line == f"={before}" for before, line in pairwise(spoken) if line.startswith("="))
        for response in (plain.reference, example.reference):
            assert task.verify(example, response).exact_chain
        for wrong in ([lines[0], *lines], [f"={lines[0]}", *lines], [lines[0], "=!", *lines[1:]]):
            assert not task.verify(example, "\n".join(wrong)).exact_chain
    assert 150 < counts[True][0] < 250
    for marked, share in ((True, 0.1), (False, 0.8)):
        assert abs(counts[marked][1] / (5 * counts[marked][0]) - share) < 0.04
    whole = make(brief=0.5)[next(i for i in range(9) if not make(brief=0.5)[i].prompt.startswith("~"))]
    assert whole.reference.count("=") == 5
    test = make("test", brief=1.0)
    assert not any(test[i].prompt.startswith("~") for i in range(100))
    with pytest.raises(ValueError, match=r"data\.brief=0\.5.*data\.flawed=0\.2"):
        make(brief=0.5, flawed=0.2)
