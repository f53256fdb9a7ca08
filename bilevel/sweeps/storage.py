"""Where snapshots are kept: beside the states, in the memory of the host, or in files."""

import ctypes
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.errors import ArgumentError, StorageError
from bilevel.sweeps.checkpointing import Snapshots, Storage
from bilevel.tree import Tree


@dataclass(frozen=True)
class InMemory(Storage):
    """Snapshots stay where the states are; nothing is copied."""

    def open(self) -> Snapshots:  # noqa: D102
        return MemorySnapshots()

    def resident(self, snapshots: int) -> int:  # noqa: D102
        return snapshots


@dataclass(frozen=True)
class OnHost(Storage):
    """Snapshots wait in the memory of the host; for states on a GPU.

    Copies run beside the computation, from and to pinned memory: a snapshot leaves while the next
    steps run, and the one that will be needed next comes back while a block is reversed. A leaf
    that lives on the host already is kept as it is.
    """

    def open(self) -> Snapshots:  # noqa: D102
        return _HostSnapshots()

    def resident(self, snapshots: int) -> int:  # noqa: D102
        return min(snapshots, 2)  # one on its way out or in use, one on its way in


@dataclass(frozen=True)
class OnDisk(Storage):
    """Snapshots wait in files, in a folder of their own that is removed when the sweep ends.

    Attributes:
        folder: where that folder is made; it must exist.
    """

    folder: str | Path

    def open(self) -> Snapshots:  # noqa: D102
        if not Path(self.folder).is_dir():
            raise ArgumentError(
                f"the folder of OnDisk must exist, got {str(self.folder)!r}: create it, on a disk "
                "with room for the snapshots."
            )
        return _DiskSnapshots(Path(self.folder))

    def resident(self, snapshots: int) -> int:  # noqa: D102
        return min(snapshots, 1)  # the one in use


class MemorySnapshots(Snapshots):
    """Snapshots in a dict."""

    def __init__(self, states: dict[int, Tree] | None = None) -> None:
        """Start from `states`."""
        self.states = dict(states or {})

    def put(self, block: int, state: Tree) -> None:  # noqa: D102
        self.states[block] = state

    def get(self, block: int) -> Tree:  # noqa: D102
        return self.states[block]

    def drop(self, block: int) -> None:  # noqa: D102
        del self.states[block]

    def close(self) -> None:  # noqa: D102
        self.states.clear()


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
        host = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=True)
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


class _DiskSnapshots(Snapshots):
    """One file a snapshot; what is no tensor stays in memory."""

    def __init__(self, folder: Path) -> None:
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="bilevel-", dir=folder))
        except OSError as error:
            raise StorageError(
                f"no folder for snapshots could be made in {folder}: {error.strerror or error}."
            ) from error
        # Also when nobody closes: a rollout never differentiated, an interpreter that ends.
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._shapes: dict[int, Tree] = {}

    def _path(self, block: int) -> Path:
        return self._folder / f"{block}.bin"

    def put(self, block: int, state: Tree) -> None:
        path = self._path(block)
        try:
            write(path, [x for x in tree.leaves_of(state) if isinstance(x, Tensor)])
        except OSError as error:
            self.close()
            raise StorageError(
                f"a snapshot could not be written to {path}: {error.strerror or error}. Nothing "
                "was left there; free space, keep fewer snapshots, or choose another folder."
            ) from error
        self._shapes[block] = tree.map_leaves(
            lambda x: _Shape(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x, state
        )

    def get(self, block: int) -> Tree:
        path = self._path(block)
        try:
            with path.open("rb") as file:
                return tree.map_leaves(
                    lambda x: x.read(file) if isinstance(x, _Shape) else x, self._shapes[block]
                )
        except OSError as error:
            self.close()
            raise StorageError(
                f"a snapshot could not be read from {path}: {error.strerror or error}. Leave the "
                "folder alone while a sweep runs."
            ) from error

    def drop(self, block: int) -> None:
        del self._shapes[block]
        self._path(block).unlink(missing_ok=True)

    def close(self) -> None:
        self._remove()


@dataclass(frozen=True)
class _Shape:
    """A tensor without its entries."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def read(self, file: Any) -> Tensor:
        """The tensor whose bytes come next in `file`."""
        found = torch.empty(self.shape, dtype=self.dtype)
        if file.readinto(_memory(found)) != found.nbytes:
            raise OSError("the file is too short")
        return found.to(self.device)


def write(path: Path, tensors: list[Tensor]) -> None:
    """Write the entries of `tensors` to a new file, one after the other."""
    with path.open("wb") as file:
        for tensor in tensors:
            plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
            file.write(_memory(plain))


def _memory(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor of the host, as they lie there."""
    # ctypes needs neither NumPy nor a copy, and takes every dtype.
    return (
        (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        if tensor.nbytes
        else bytearray()
    )
