"""The rules of membership, on a clock of our own; and many random lives of replicas and stores against what must always hold."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from ncclx_py.elastic.membership import GRACE, Membership, Rules

pytestmark = pytest.mark.unit
RULES = Rules("run", count=3, least=1, deadline_s=10.0, lease_s=10.0, gather_s=60.0)


class World:
    """A membership with a clock to turn and a journal to look at. Replica i is incarnation "i"."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.now, self.journal, self.rules = 0.0, [], rules
        self.state = Membership(lambda: self.now, self.journal.append)

    def restart(self) -> None:
        events = json.loads(json.dumps(self.journal))
        self.state = Membership(lambda: self.now, self.journal.append)
        self.state.restore(events)

    def join(self, replica: int, step: int = 0, incarnation: str = "") -> Any:
        return self.state.join(replica, incarnation or str(replica), step, self.rules)

    def found(self, *replicas: int) -> int:
        for _ in range(2):
            for replica in replicas:
                self.join(replica)
        assert sorted(self.state.members) == sorted(replicas)
        return self.state.epoch

    def wait(self, seconds: float, alive: tuple[int, ...] = (), busy: tuple[int, ...] = ()) -> None:
        for _ in range(int(seconds * 10)):
            self.now += 0.1
            for replica in alive:
                self.state.beat(replica, str(replica), 0, replica in busy)
            self.state.tick()

    def commit(self, *replicas: int) -> None:
        step, epoch = self.state.step, self.state.epoch
        answers = [self.state.vote(replica, str(replica), epoch, step) for replica in replicas]
        assert answers[-1] == {"answer": "commit"}


def test_a_closed_connection_ends_the_epoch_and_a_new_one_in_time_does_not() -> None:
    world = World()
    epoch = world.found(0, 1, 2)
    world.state.beat(1, "1", 0, False)
    world.state.lose(1, "1", 0)
    world.wait(GRACE / 2, alive=(0, 2))
    world.state.beat(1, "1", 0, False)  # it was only the connection
    world.wait(2 * GRACE, alive=(0, 1, 2))
    assert world.state.epoch == epoch
    world.state.lose(1, "1", 0)
    world.wait(GRACE + 0.3, alive=(0, 2))
    assert (world.state.epoch, sorted(world.state.members)) == (epoch + 1, [0, 2])
    assert world.state.vote(1, "1", epoch, 0) == {"answer": "dropped", "step": 0}
    assert world.state.arrive(0, "0", epoch, "facts") == {"answer": "changed"}


def test_silence_and_being_late_are_found_within_the_deadline_unless_busy() -> None:
    world = World()
    epoch = world.found(0, 1, 2)
    world.wait(9, alive=(0, 1))
    assert world.state.epoch == epoch
    world.wait(1.2, alive=(0, 1))
    assert sorted(world.state.members) == [0, 1]  # 2 was silent for a lease
    assert world.state.arrive(0, "0", world.state.epoch, "facts") is None
    world.wait(30, alive=(0, 1), busy=(1,))
    assert sorted(world.state.members) == [0, 1]  # 1 saves a checkpoint
    world.wait(10.5, alive=(0, 1))
    assert sorted(world.state.members) == [0]  # 1 is alive, but keeps 0 waiting


def test_a_failure_is_given_half_a_deadline_and_all_failing_ends_it_at_once() -> None:
    world = World()
    epoch = world.found(0, 1, 2)
    assert world.state.fail(0, "0", epoch, "lane")["answer"] == "noted"
    assert world.state.begin(0, "0", 0, 0) is None  # it waits for the next epoch
    assert world.state.vote(1, "1", epoch, 0) is None
    world.wait(4.5, alive=(0, 1, 2))
    assert world.state.epoch == epoch
    world.wait(1, alive=(0, 1, 2))
    assert sorted(world.state.members) == [0, 1]
    epoch = world.state.epoch
    world.state.fail(1, "1", epoch, "lane")
    assert world.state.vote(0, "0", epoch, 0) == {"answer": "changed"} or world.state.epoch == epoch + 1
    assert sorted(world.state.members) == [0, 1]


def test_a_commit_is_final_and_a_replica_that_slept_commits_nothing() -> None:
    world = World()
    epoch = world.found(0, 1, 2)
    assert world.state.vote(0, "0", epoch, 0) is None
    assert world.state.vote(1, "1", epoch, 0) is None
    world.wait(10.5, alive=(0, 1))  # 2 sleeps before its vote: nobody has applied step 0
    assert world.state.vote(2, "2", epoch, 0) == {"answer": "dropped", "step": 0}
    epoch = world.state.epoch
    world.commit(0, 1)
    world.restart()
    for replica in (0, 1):  # the reply got lost: the same question, after a restart of the store
        assert world.state.vote(replica, str(replica), epoch, 0) == {"answer": "commit"}
    assert world.state.vote(2, "2", epoch, 0)["answer"] == "dropped"
    assert [event["step"] for event in world.journal if event["event"] == "commit"] == [0]


def test_a_newcomer_fetches_from_a_member_and_joins_at_a_commit() -> None:
    world = World()
    world.found(0, 1, 2)
    world.state.leave(2, "2")
    world.commit(0, 1)
    answer = world.join(2, 0, "again")
    donor = answer["donor"]
    assert (answer["answer"], answer["step"]) == ("fetch", 1)
    assert answer["session"] in world.state.begin(donor, str(donor), 1, 0)["serve"]
    assert world.state.ready(2, "again", 1) is None
    world.commit(0, 1)
    seat = world.state.ready(2, "again", 1)
    assert (seat["answer"], seat["step"], seat["members"]) == ("member", 2, [0, 1, 2])
    world.state.leave(2, "again")
    first = world.join(2, 0, "third")["donor"]
    world.state.leave(first, str(first))
    assert world.join(2, 0, "third")["donor"] == 1 - first  # the donor died: another one


def test_below_the_minimum_the_run_pauses_until_a_newcomer_is_ready() -> None:
    world = World(Rules("run", count=2, least=2, deadline_s=10.0, lease_s=10.0, gather_s=0.0))
    world.found(0, 1)
    world.state.leave(1, "1")
    assert world.state.begin(0, "0", 0, 0) is None
    world.join(1, 0, "again")
    assert world.state.begin(0, "0", 0, 0)["answer"] == "paused"  # it may give its state away
    assert world.state.ready(1, "again", 0)["answer"] == "member"
    assert world.state.begin(0, "0", 0, 0)["answer"] == "go"


def test_founding_waits_for_all_then_for_enough_and_begins_with_the_newest() -> None:
    world = World()
    world.join(0, 40)
    world.join(1, 60)
    world.wait(50, alive=(0, 1))
    assert not world.state.members
    world.wait(11, alive=(0, 1))
    assert (sorted(world.state.members), world.state.step) == ([1], 60)
    assert world.join(0, 40)["donor"] == 1


def test_what_does_not_fit_is_refused() -> None:
    world = World()
    world.found(0, 1, 2)
    other = Rules("run", count=3, least=1, deadline_s=5.0, lease_s=5.0, gather_s=60.0)
    assert "use equal values" in world.state.join(4, "4", 0, other)["why"]
    world.state.beat(1, "1", 0, False)
    assert "running already" in world.join(1, 0, "twin")["why"]
    world.wait(GRACE + 0.5, alive=(0, 2))
    world.join(1, 0, "twin")  # now the first is silent: it was restarted
    assert world.join(1, 0, "twin")["answer"] == "fetch"


class Life:
    """A replica that trains, sleeps, dies and returns; `applied` are the (step, epoch) that its weights have seen."""

    def __init__(self, name: int) -> None:
        self.name, self.births = name, 0
        self.be_born()

    def be_born(self) -> None:
        self.births += 1
        self.incarnation = f"{self.name}.{self.births}"
        self.applied: list[tuple[int, int]] = []
        self.phase, self.epoch, self.session, self.asleep = "join", 0, None, 0

    def live(self, world: World, others: dict[int, Life]) -> None:
        state, me = world.state, (self.name, self.incarnation)
        state.beat(*me, 0, False)
        step = len(self.applied)
        if self.phase == "join":
            answer = state.join(*me, step, world.rules)
            if answer and answer["answer"] == "member":
                self.phase = "begin"
            elif answer and answer["answer"] == "fetch" and self.session != answer["session"]:
                self.session = answer["session"]
                donor = others[answer["donor"]]
                if donor.phase == "begin" and state.members.get(donor.name) == donor.incarnation:
                    self.applied, self.phase = list(donor.applied), "ready"
                self.session = None
        elif self.phase == "ready":
            answer = state.ready(*me, step)
            if answer and answer["answer"] == "member":
                made = {e["step"]: (e["step"], e["epoch"]) for e in world.journal if e["event"] == "commit"}
                while len(self.applied) < answer["step"]:  # what the donor hands over
                    self.applied.append(made[len(self.applied)])
                self.phase = "begin"
            elif answer:
                self.phase = "join"
        elif self.phase == "begin":
            answer = state.begin(*me, step, 0)
            if answer and answer["answer"] == "go":
                self.epoch, self.phase = answer["epoch"], "facts"
            elif answer and answer["answer"] == "dropped":
                self.phase = "join"
        elif self.phase in ("facts", "figures"):
            answer = state.arrive(*me, self.epoch, self.phase)
            if answer:
                ahead = "figures" if self.phase == "facts" else "vote"
                self.phase = ahead if answer["answer"] == "go" else "begin"
        elif self.phase == "vote":
            answer = state.vote(*me, self.epoch, step)
            if answer:
                if answer["answer"] == "commit":
                    self.applied.append((step, self.epoch))
                self.phase = "begin"


@pytest.mark.parametrize("seed", range(12))
def test_random_lives(seed: int) -> None:
    """Kills, sleeps, restarts of the store: weights always have seen the committed steps in order, each once, and nothing else."""
    rng = random.Random(seed)
    world = World(Rules("run", count=4, least=1, deadline_s=1.0, lease_s=1.0, gather_s=5.0))
    lives = {name: Life(name) for name in range(4)}
    for _ in range(4000):
        world.now += rng.uniform(0.0, 0.02)
        life = rng.choice(list(lives.values()))
        awake = [other for other in lives.values() if not other.asleep]
        if life.asleep:
            life.asleep -= 1
        elif rng.random() < 0.004 and len(awake) > 2:
            life.asleep = rng.randrange(200)
        elif rng.random() < 0.003 and len(awake) > 2:
            world.state.lose(life.name, life.incarnation, 0)
            life.be_born()
        else:
            life.live(world, lives)
        if rng.random() < 0.002:
            world.restart()
        world.state.tick()
    final: dict[int, int] = {}
    for event in world.journal:
        if event["event"] == "commit":
            assert event["step"] not in final, "a step was committed twice"
            final[event["step"]] = event["epoch"]
    assert len(final) > 50
    assert sum(event["event"] == "epoch" for event in world.journal) > 5
    for life in lives.values():
        assert life.applied == sorted(final.items())[: len(life.applied)]
