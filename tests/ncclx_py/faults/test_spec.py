"""Faults as people write them: read, refused with the valid forms, and checked against the job."""

from __future__ import annotations

import pytest

from ncclx_py.faults.spec import Fault, InjectError, check_links, check_ranks, join, parse, parse_all

pytestmark = pytest.mark.unit


def test_every_kind_is_read() -> None:
    assert parse("kill:rank=3,step=20") == Fault("kill", "kill:rank=3,step=20", rank=3, step=20)
    assert parse(" stop:rank=1, call=7, for=2.5, group=pair ") == Fault(
        "stop", "stop:rank=1, call=7, for=2.5, group=pair", rank=1, call=7, duration=2.5, group="pair"
    )
    assert parse("delay:rank=0,seconds=1.5,for=3").seconds == 1.5
    link = parse("drop-link:host=1,rail=0,step=4,for=2")
    assert (link.host, link.rail, link.rank, link.duration) == (1, 0, None, 2.0)
    assert parse("halve-rate:rank=2,seconds=0").rank == 2
    both = parse_all("nan:rank=0,step=1; ;skip:rank=1,call=2,group=world")
    assert [fault.kind for fault in both] == ["nan", "skip"]
    assert parse_all(join(both)) == both


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is no kind of fault"),
        ("explode:rank=1,step=2", "'explode' is no kind"),
        ("kill:step=2", "rank=R is missing"),
        ("kill:rank=1", "exactly one of step, call, seconds"),
        ("kill:rank=1,step=2,call=3", "not ['step', 'call']"),
        ("kill:rank=-1,step=2", "rank=-1 is not a whole number"),
        ("kill:rank=1,step=0", "the first is step=1"),
        ("kill:rank=1,step=2,for=3", "kill takes no 'for'"),
        ("kill:rank=1,step=2,step=3", "step is given twice"),
        ("kill:rank=1,step", "'step' is not KEY=VALUE"),
        ("delay:rank=1,step=2", "needs for=SECONDS"),
        ("delay:rank=1,step=2,for=nan", "for=nan is not a number of seconds"),
        ("delay:rank=1,seconds=1e9,for=1", "seconds=1e9 is not"),
        ("stop:rank=1,step=2,group=pair", "group= goes with call="),
        ("drop-link:step=2", "give host=H, or rank=R"),
        ("drop-link:host=1,rank=1,step=2", "give host=H, or rank=R"),
        ("skip:host=1,rank=2,call=3", "skip takes no 'host'"),
    ],
)
def test_mistakes_are_named_with_the_valid_forms(text: str, words: str) -> None:
    with pytest.raises(InjectError) as caught:
        parse(text)
    message = str(caught.value)
    assert words in message
    assert repr(text) in message
    assert "kill:rank=3,step=20" in message  # an example of what is right
    assert "wrong-order" in message  # the kinds


def test_faults_must_fit_the_job() -> None:
    check_ranks([parse("kill:rank=3,step=1")], 4)
    check_ranks([parse("kill:rank=300,step=1")], None)  # a size that the rendezvous will tell
    with pytest.raises(InjectError, match="rank 4 is not one of this job's, 0 to 3"):
        check_ranks([parse("kill:rank=4,step=1")], 4)
    with pytest.raises(InjectError, match="use ncclx launch emulate"):
        check_ranks([parse("drop-link:host=0,step=1")], 4)
    with pytest.raises(InjectError, match="host 2 is not one of this job's, 0 to 1"):
        check_ranks([parse("drop-link:host=2,step=1")], 4, hosts=2)
    with pytest.raises(InjectError, match="rail 1 is not one of the hosts', 0 to 0"):
        check_links([parse("drop-link:host=0,rail=1,step=1")], [None])
    with pytest.raises(InjectError, match="give the cluster a --rate"):
        check_links([parse("halve-rate:host=0,step=1")], [None])
    check_links([parse("halve-rate:host=0,step=1"), parse("drop-link:host=0,step=1")], [1e6])
