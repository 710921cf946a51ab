"""The `ncclx` process group: what torch.distributed, DDP, FSDP2 and DeepSpeed call.

Each method checks its arguments on this rank, picks the local backend of the tensor's device, and returns a
`CollectiveWork`. Nothing else happens here. Both generations of c10d's names are defined (``all_gather_single`` and
``_allgather_base``, and so on), because torch calls the new one from Python and DeepSpeed, or older torch, the old one.

A subclass of ``dist.ProcessGroup`` bypasses c10d's dispatcher, and with it the profiler's collective ops: each call is
recorded as ``ncclx::<op>`` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from ncclx_py.errors import Call
from ncclx_py.runtime import check
from ncclx_py.runtime.group_base import GroupBase
from ncclx_py.runtime.local import LocalBackend
from ncclx_py.runtime.work import CollectiveWork

Tensors = Sequence[Tensor] | Tensor
Result = CollectiveWork | None


class NcclxProcessGroup(GroupBase):
    """A group of ranks whose collectives run as plans, over shared memory and TCP (CPU tensors) or NCCL (CUDA tensors).

    Made by torch through ``init_process_group("ncclx")`` and ``new_group``. `opts` are c10d's options objects and may be
    left out; a `ReduceOp` may stand in their place. Ranks are group ranks. Inside a coalescing block on CUDA the result
    is None, as it is with NCCL.
    """

    # Reductions

    def allreduce(self, tensors: Tensors, opts: Any = None, timeout: timedelta | None = None) -> Result:
        call = self.ask("all_reduce", opts, timeout)
        tensor = check.one(call, _listed(tensors))
        if not tensor.is_sparse:
            check.dense(call, tensor)
        op = _reduction(call, opts)
        return self.start(call, tensor, lambda local: local.all_reduce(call, tensor, op))

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Result:
        call = self.ask("all_reduce_coalesced", opts)
        several = _listed(tensors)
        check.dense(call, *several)
        op = _reduction(call, opts)
        return self.start(call, several, lambda local: local.all_reduce_coalesced(call, several, op))

    def reduce(
        self, tensors: Tensors, opts: Any = None, op: Any = None, timeout: timedelta | None = None, root: int = 0
    ) -> Result:
        call = self.ask("reduce", opts, timeout)
        tensor = check.one(call, _listed(tensors))
        check.dense(call, tensor)
        root, op = self._root(call, opts, root), _reduction(call, opts if op is None else op)
        return self.start(call, tensor, lambda local: local.reduce(call, tensor, root, op))

    def reduce_scatter(
        self, outputs: Tensors, inputs: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> Result:
        call = self.ask("reduce_scatter", opts, timeout)
        output, several = check.one(call, _listed(outputs), "outputs"), _inner(call, inputs, "inputs")
        check.per_rank(call, several, "inputs")
        check.together(call, output, *several)
        check.elements(call, output, several[self.rank()].numel(), "output")
        op = _reduction(call, opts)
        return self.start(call, several, lambda local: local.reduce_scatter(call, output, several, op), output)

    def reduce_scatter_single(self, output: Tensor, source: Tensor, opts: Any = None) -> Result:
        return self._reduce_scatter_flat("reduce_scatter_single", [output], [source], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Result:
        return self._reduce_scatter_flat("reduce_scatter_single_coalesced", list(outputs), list(inputs), opts)

    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # Data movement

    def broadcast(self, tensors: Tensors, opts: Any = None, timeout: timedelta | None = None, root: int = 0) -> Result:
        call = self.ask("broadcast", opts, timeout)
        tensor = check.one(call, _listed(tensors))
        check.dense(call, tensor)
        root = self._root(call, opts, root)
        return self.start(call, tensor, lambda local: local.broadcast(call, tensor, root))

    def allgather(self, outputs: Any, inputs: Tensors, opts: Any = None, timeout: timedelta | None = None) -> Result:
        call = self.ask("all_gather", opts, timeout)
        source, several = check.one(call, _listed(inputs), "inputs"), _inner(call, outputs, "outputs")
        check.per_rank(call, several, "outputs")
        check.together(call, source, *several)
        check.elements(call, source, several[self.rank()].numel(), "input")
        return self.start(call, source, lambda local: local.all_gather(call, several, source), several)

    def allgather_coalesced(self, output_lists: Any, inputs: Sequence[Tensor], opts: Any = None) -> Result:
        """`output_lists[i][r]` takes input `i` of rank `r`."""
        call = self.ask("all_gather_coalesced", opts)
        check.equal_length(call, output_lists, inputs)
        works = [self.allgather([several], [source], opts) for several, source in zip(output_lists, inputs)]
        return self.joined(call, works, [list(several) for several in output_lists])

    def all_gather_single(self, output: Tensor, source: Tensor, opts: Any = None) -> Result:
        return self._all_gather_flat("all_gather_single", [output], [source], opts)

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Result:
        return self._all_gather_flat("all_gather_single_coalesced", list(outputs), list(inputs), opts)

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def all_to_all_single(
        self,
        output: Tensor,
        source: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = None,
        timeout: timedelta | None = None,
    ) -> Result:
        call = self.ask("all_to_all_single", opts, timeout)
        check.together(call, source, output)
        received = check.splits(call, output, output_splits, "output")
        sent = check.splits(call, source, input_splits, "input")
        if not output_splits and not input_splits:
            check.elements(call, output, source.numel(), "output")
            received = sent = []
        call.splits = (sent, received)
        run: Callable[[LocalBackend], Any] = lambda local: local.all_to_all_single(  # noqa: E731
            call, output, source, received, sent
        )
        return self.start(call, source, run, output)

    alltoall_base = all_to_all_single

    def alltoall(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        opts: Any = None,
        timeout: timedelta | None = None,
    ) -> Result:
        call = self.ask("all_to_all", opts, timeout)
        targets, sources = list(outputs), list(inputs)
        check.per_rank(call, targets, "outputs")
        check.per_rank(call, sources, "inputs")
        check.together(call, *sources, *targets)
        check.elements(call, targets[self.rank()], sources[self.rank()].numel(), "outputs[own rank]")
        return self.start(call, sources, lambda local: local.all_to_all(call, targets, sources), targets)

    def gather(
        self, outputs: Any, inputs: Tensors, opts: Any = None, timeout: timedelta | None = None, root: int = 0
    ) -> Result:
        call = self.ask("gather", opts, timeout)
        source, root = check.one(call, _listed(inputs), "inputs"), self._root(call, opts, root)
        several = _inner(call, outputs, "outputs") if self.rank() == root else check.nothing(call, outputs, "outputs")
        self._check_rooted(call, root, source, several, "outputs")
        return self.start(call, source, lambda local: local.gather(call, several, source, root), several)

    def scatter(
        self, outputs: Tensors, inputs: Any, opts: Any = None, timeout: timedelta | None = None, root: int = 0
    ) -> Result:
        call = self.ask("scatter", opts, timeout)
        output, root = check.one(call, _listed(outputs), "outputs"), self._root(call, opts, root)
        several = _inner(call, inputs, "inputs") if self.rank() == root else check.nothing(call, inputs, "inputs")
        self._check_rooted(call, root, output, several, "inputs")
        run: Callable[[LocalBackend], Any] = lambda local: local.scatter(call, output, several, root)  # noqa: E731
        return self.start(call, several or output, run, output)

    # Synchronisation

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> Result:
        """Returns (or its work completes) when every rank has come here.

        It runs on the CPU, after this rank's current CUDA stream has drained, so it means the same on every rank
        whatever tensors the group has seen; with ``device_ids`` it is NCCL's.
        """
        call = self.ask("barrier", opts, timeout)
        device = getattr(opts, "device", None)
        if device is None or device.type != "cuda":
            device = torch.device("cpu")
            if torch.cuda.is_initialized():
                torch.cuda.current_stream().synchronize()
        return self.start(call, device, lambda local: local.barrier(call, device))

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier that names the ranks that did not come; rank 0 collects the answers (``monitored.py``)."""
        call = self.ask("monitored_barrier", None, timeout)
        self.monitored(call, wait_all_ranks)

    # Point to point

    def send(self, tensors: Tensors, to: int, tag: int = 0) -> Result:
        call = self.message("send", to, tag)
        tensor = check.one(call, _listed(tensors))
        check.dense(call, tensor)
        check.peer(call, to, "destination")
        check.tag(call, tag)
        return self.start(call, tensor, lambda local: local.send(call, tensor, to, tag), [])

    def recv(self, tensors: Tensors, source: int, tag: int = 0) -> Result:
        call = self.message("recv", source, tag)
        tensor = check.one(call, _listed(tensors))
        check.dense(call, tensor)
        check.peer(call, source, "source")
        check.tag(call, tag)
        return self.start(call, tensor, lambda local: local.recv(call, tensor, source, tag))

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Result:
        call = self.message("recv_any_source", tag=tag)
        tensor = check.one(call, _listed(tensors))
        check.dense(call, tensor)
        check.tag(call, tag)
        return self.start(call, tensor, lambda local: local.recv_any_source(call, tensor, tag))

    # Parts

    def _reduce_scatter_flat(self, op: str, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> Result:
        call = self.ask(op, opts)
        check.equal_length(call, outputs, inputs)
        for output, source in zip(outputs, inputs):
            check.together(call, source, output)
            check.elements(call, source, output.numel() * self.size(), "input")
        reduction = _reduction(call, opts)
        run: Callable[[LocalBackend], Any] = lambda local: local.reduce_scatter_single(  # noqa: E731
            call, outputs, inputs, reduction
        )
        return self.start(call, inputs, run, outputs)

    def _all_gather_flat(self, op: str, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> Result:
        call = self.ask(op, opts)
        check.equal_length(call, outputs, inputs)
        for output, source in zip(outputs, inputs):
            check.together(call, source, output)
            check.elements(call, output, source.numel() * self.size(), "output")
        return self.start(call, inputs, lambda local: local.all_gather_single(call, outputs, inputs), outputs)

    def _root(self, call: Call, opts: Any, root: int) -> int:
        """The root's group rank: from the options, from an int in their place, or from the keyword."""
        chosen = opts if isinstance(opts, int) else getattr(opts, "rootRank", root)
        check.rank(call, chosen, "root")
        call.root = chosen
        return chosen

    def _check_rooted(self, call: Call, root: int, mine: Tensor, several: list[Tensor], name: str) -> None:
        check.dense(call, mine)
        if self.rank() == root:
            check.per_rank(call, several, name)
            check.together(call, mine, *several)
            check.same_elements(call, several, mine.numel(), name)


def _listed(tensors: Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _inner(call: Call, lists: Any, name: str) -> list[Tensor]:
    """The inner list of c10d's list of lists of tensors; a plain list is taken as it is."""
    if lists and isinstance(lists[0], Tensor):
        return list(lists)
    if len(lists) != 1:
        raise ValueError(f"{call}: `{name}` must hold one list of tensors, got {len(lists)}.")
    return list(lists[0])


def _reduction(call: Call, opts: Any) -> Any:
    """The reduction in `opts`, which may be options, a `ReduceOp`, or None for a sum; noted in the call."""
    plain = opts is None or isinstance(opts, int)
    call.reduce_op = ReduceOp.SUM if plain else getattr(opts, "reduceOp", opts)
    return call.reduce_op
