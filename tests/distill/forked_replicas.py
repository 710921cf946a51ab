"""A run of several replicas whose jobs are forked from one process that has imported everything: they start in no time."""

from __future__ import annotations

from dataclasses import dataclass, field

from nursery import Nursery, nursery_for

from distill.bench.replicas import TINY, Cluster


@dataclass
class ForkedCluster(Cluster):
    nursery: Nursery = field(default_factory=lambda: nursery_for(("distill.train", "distill.trainer")))

    def start(self, replica: int) -> None:
        overrides = [*TINY, "run.tensorboard=false", f"run.dir={self.folder}", *self.options(replica), *self.overrides]
        log = self.folder / f"replica_{replica}.log"
        self.jobs[replica] = self.nursery.start(__file__, "train", [overrides], log)  # type: ignore[assignment]


def train(overrides: list[str]) -> int:
    """One job, in a process of its own."""
    import torch

    import distill.train

    torch.set_num_threads(1)
    return distill.train.main(overrides)
