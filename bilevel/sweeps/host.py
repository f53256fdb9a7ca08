"""Snapshots in the memory of the host, for states on a GPU."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.sweeps.storage import IN_MEMORY, Snapshots, Storage
from bilevel.tree import Tree


@dataclass(frozen=True)
class OnHost(Storage):
    """Snapshots wait in the memory of the host; for states on a GPU.

    Copies run beside the computation, from and to pinned memory: a snapshot leaves while the next
    steps run, and the one that will be needed next comes back while a block is reversed. A leaf
    that lives on the host already is kept as it is.

    Example:
        >>> import torch, bilevel as bl
        >>> walk = bl.ControlProblem(
        ...     bl.Map(lambda x, u, t: x + u),
        ...     terminal=lambda x, control: x**2,
        ...     horizon=2,
        ...     running=lambda x, u, t: u**2,
        ... )
        >>> kept = bl.Checkpointing(storage=bl.OnHost())
        >>> bl.adjoint(
        ...     walk, torch.tensor(1.0), torch.tensor(0.5), checkpointing=kept
        ... ).gradient
        tensor(10.)
    """

    def open(self) -> Snapshots:  # noqa: D102
        return _HostSnapshots()

    def resident(self, snapshots: int) -> int:  # noqa: D102
        return min(snapshots, 2)  # one on its way out or in use, one on its way in

    def bounded(self, devices: Iterable[torch.device]) -> Storage:  # noqa: D102
        return self if all(d.type == "cuda" for d in devices) else IN_MEMORY  # they stay


class _HostSnapshots(Snapshots):
    """Pinned copies, made and brought back on one stream beside that of the steps."""

    def __init__(self) -> None:
        self._states: dict[int, tuple[Tree, Tree]] = {}  # the copy, and what it is a copy of
        self._order: list[int] = []
        self._ahead: dict[int, Tree] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def _beside(self, device: torch.device) -> torch.cuda.Stream:
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        return stream

    def put(self, block: int, state: Tree) -> None:
        devices = tree.map_leaves(lambda x: x.device if _on_gpu(x) else None, state)
        self._states[block] = tree.map_leaves(self._leave, state), devices
        self._order.append(block)

    def _leave(self, leaf: Any) -> Any:
        if not _on_gpu(leaf):
            return leaf
        leaf = leaf.resolve_conj().resolve_neg()
        host = torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu", pin_memory=True)
        stream = self._beside(leaf.device)
        with torch.cuda.stream(stream):
            host.copy_(leaf, non_blocking=True)
        leaf.record_stream(stream)  # its memory is not given away before the copy is done
        return host

    def _return(self, leaf: Any, device: torch.device | None) -> Any:
        if device is None:
            return leaf
        # The stream makes its copies in order, so the one to the host is complete.
        with torch.cuda.stream(self._beside(device)):
            return leaf.to(device, non_blocking=True)

    def get(self, block: int) -> Tree:
        if block not in self._ahead:
            self._ahead = {block: tree.map_leaves(self._return, *self._states[block])}
        state = self._ahead.pop(block)
        for leaf in tree.leaves_of(state):
            if _on_gpu(leaf):
                current = torch.cuda.current_stream(leaf.device)
                current.wait_stream(self._streams[leaf.device])
                leaf.record_stream(current)
        # A schedule comes back to snapshots last first.
        if self._streams and len(self._order) > 1 and self._order[-1] == block:
            earlier = self._order[-2]
            if earlier not in self._ahead:
                self._ahead = {earlier: tree.map_leaves(self._return, *self._states[earlier])}
        return state

    def drop(self, block: int) -> None:
        self._order.pop()
        del self._states[block]
        self._ahead.pop(block, None)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()
        self._states.clear()
        self._order.clear()
        self._ahead.clear()


def _on_gpu(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_cuda
