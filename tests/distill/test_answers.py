"""Answer extraction and comparison; math-verify in its helper process: late, dead, threaded, forked."""

import os
import random
import signal
import string
import threading
import time
from fractions import Fraction

import pytest

from distill.answers import answers_match, extract_answer, number_before_unit, parse_number, strip_special
from distill.data import math_worker
from distill.data.math_worker import MathWorker

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a\n#### 72", "72"),
        ("#### 1\n#### 2", "1"),
        ("####\n#### 2", "2"),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("#### 3 and \\boxed{4}", "3 and \\boxed{4}"),
        ("The answer is 72.", "72"),
        ("the final answer is: **\\(7\\)**.", "\\(7\\)"),
        ("Answer: 3.5 dollars. Great!", "3.5 dollars"),
        ("so 3, then 1,234.5", "1,234.5"),
        ("it is -5", "-5"),
        ("5 \N{MINUS SIGN}5", "-5"),
        ("3-5", "5"),
        ("<think>#### 5</think> it is 6", "6"),
        ("x \\boxed{3", "3"),
        ("nothing", None),
        ("", None),
        ("####", None),
    ],
)
def test_extraction(text, answer):
    assert extract_answer(text) == answer


def test_extraction_without_fallback():
    assert extract_answer("it costs 3", fallback="none") is None
    assert extract_answer("\\boxed{3}", fallback="none") == "3"


@pytest.mark.parametrize(
    ("predicted", "gold", "equal"),
    [
        ("72", "72.0", True),
        ("1,000", "1000.00", True),
        ("1234,567", "1234567", False),
        ("+5", "5", True),
        ("72", "-72", False),
        ("-5", "\N{MINUS SIGN}5", True),
        ("0.5", "\\frac{1}{2}", True),
        ("\\dfrac12", "1/2", True),
        ("-\\frac{3}{4}", "-0.75", True),
        ("0.333333", "1/3", True),
        ("0.33", "1/3", False),
        ("1000001", "1000000", False),
        ("0.0000001", "0.0000002", False),
        ("1/0", "1", False),
        ("1 1/2", "11/2", False),
        ("3 4", "34", False),
        ("10\\,000", "10000", True),
        ("\\$18", "18", True),
        ("**18**.", "18", True),
        ("18\\text{ dollars}", "18", True),
        ("50%", "0.5", True),
        ("50\\%", "50", True),
        ("0.5", "50", False),
        ("\\text{(B)}", "B", True),
        ("Tuesday", "tuesday.", True),
        ("A and B", "A", False),
        ("", "5", False),
        ("$$", "", False),
        (None, "5", False),
        ("9" * 300, "9" * 300, True),
        ("9" * 5000, "9", False),
        ("(x+1)^2", "x^2+2x+1", True),
        ("2\\sqrt2", "\\sqrt{8}", True),
        ("(3,\\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("x=5", "5", True),
        ("2\\pi", "2", False),
        ("x+5", "5", False),
    ],
)
def test_comparison(predicted, gold, equal):
    assert answers_match(predicted, gold) is equal


def test_numbers():
    assert parse_number("$1,234.50") == Fraction(12345, 10)
    assert parse_number("-.5") == Fraction(-1, 2)
    assert [parse_number(text) for text in ("", "x", "1 2x", "1e99999999", "1,23", "--1", "٣")] == [None] * 7
    assert number_before_unit("-72 red clips") == "-72"
    assert [number_before_unit(text) for text in ("48+24", "5x", "72", "a 72")] == ["48+24", "5x", "72", "a 72"]
    assert strip_special(" 7 <eos><pad> </s>\n<|im_end|>") == "7"
    assert strip_special("a > b <3>") == "a > b <3>"


def test_random_text_never_raises_and_never_takes_long(monkeypatch):
    """Fragments chosen to confuse: markers, braces, numbers, control characters, half characters."""
    monkeypatch.setattr(math_worker, "shared", lambda: type("Never", (), {"equal": lambda *a: False}))
    pieces = [
        "####",
        "\\boxed{",
        "}",
        "{",
        "\\frac",
        "$",
        "-",
        ",",
        ".",
        "%",
        "9" * 400,
        "answer is",
        "</think>",
        "<",
        "|>",
    ]
    pieces += ["\ud800", "\x00", "é", "١", "\n", " ", "\\text{", *string.printable]
    rng = random.Random(0)
    began = time.perf_counter()
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 60)))
        found = extract_answer(text)
        assert found is None or found.strip()
        assert isinstance(answers_match(found, "".join(rng.choices(pieces, k=5))), bool)
        parse_number(text)
        number_before_unit(text)
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize(
    "piece", ["9", " ", "####", "\\boxed{", "answer is ", "<", "<a", "1,", "answer:\t", "-", "$", "\n"]
)
def test_long_repetitive_text_costs_linear_time(piece):
    text = piece * (400_000 // len(piece))
    began = time.perf_counter()
    extract_answer(text)
    extract_answer(text + ">")
    answers_match(text, "5")
    assert time.perf_counter() - began < 5


def test_random_latex_reaches_math_verify_and_comes_back():
    pieces = [
        "\\frac{",
        "}",
        "{",
        "x",
        "2",
        "^",
        "_",
        "\\sqrt",
        "(",
        ")",
        "+",
        "=",
        ",",
        "\\ud",
        "\ud800",
        "\n",
        "\x00",
        "'",
        '"',
    ]
    rng = random.Random(1)
    for _ in range(60):
        assert isinstance(answers_match("x" + "".join(rng.choices(pieces, k=8)), "\\frac{x}{2}"), bool)


def true_in_a_fork(function):
    """Whether ``function`` returns true in a forked process within 30 s; a process that hangs ends by its alarm."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        os._exit(0 if function() else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.fixture
def worker():
    worker = MathWorker(seconds=1.0)
    yield worker
    worker.close()


def test_a_comparison_that_never_ends_is_given_up_and_the_next_one_works(worker):
    assert worker.equal("(x+1)^2", "x^2+2x+1")
    process = worker._process
    os.kill(process.pid, signal.SIGSTOP)  # the helper hangs, as in a computation that ignores signals
    began = time.perf_counter()
    assert worker.equal("x", "y") is False
    assert time.perf_counter() - began < 3
    assert process.poll() is not None
    assert worker.equal("(x+1)^2", "x^2+2x+1")


def test_a_helper_that_died_is_replaced(worker):
    assert worker.equal("x+x", "2x")
    worker._process.kill()
    worker._process.wait()
    assert worker.equal("x+x", "2x")


def test_threads_share_one_helper(worker):
    """math-verify itself refuses to work outside the main thread."""
    worker.seconds = 20
    results = {}
    work = [("x+x", "2x", True), ("x", "y", False), ("\\sqrt{8}", "2\\sqrt{2}", True), ("3x", "2x", False)]
    threads = [threading.Thread(target=lambda p=p, g=g: results.update({p: worker.equal(p, g)})) for p, g, _ in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {predicted: equal for predicted, _, equal in work}


def test_a_forked_process_gets_a_helper_of_its_own(worker):
    worker.seconds = 20
    assert worker.equal("x+x", "2x")
    mine = worker._process.pid

    def compare():
        equal = worker.equal("x+x", "2x") and worker._process.pid != mine
        worker.close()
        return equal

    assert true_in_a_fork(compare)
    assert worker.equal("(x+1)^2", "x^2+2x+1")
    assert worker._process.pid == mine


def test_a_helper_that_cannot_start_is_an_error(worker, monkeypatch):
    monkeypatch.setattr(math_worker.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="is math-verify installed"):
        worker.equal("x", "x")


def test_the_shared_helper_is_not_inherited_even_while_a_thread_holds_its_lock():
    shared = math_worker.shared()
    with shared._lock:
        assert true_in_a_fork(lambda: answers_match("(x+7)^2", "x^2+14x+49"))
