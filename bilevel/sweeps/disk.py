"""Snapshots in files."""

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
from bilevel.sweeps.storage import Snapshots, Storage
from bilevel.tree import Tree


@dataclass(frozen=True)
class OnDisk(Storage):
    """Snapshots wait in files, in a folder of their own that is removed when the sweep ends.

    Attributes:
        folder: where that folder is made; it must exist.

    Example:
        >>> import tempfile
        >>> import torch, bilevel as bl
        >>> walk = bl.ControlProblem(
        ...     bl.Map(lambda x, u, t: x + u),
        ...     terminal=lambda x, control: x**2,
        ...     horizon=2,
        ...     running=lambda x, u, t: u**2,
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kept = bl.Checkpointing(storage=bl.OnDisk(folder))
        ...     bl.adjoint(
        ...         walk, torch.tensor(1.0), torch.tensor(0.5), checkpointing=kept
        ...     ).gradient
        tensor(10.)
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
        found = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        if file.readinto(entries(found)) != found.nbytes:
            raise OSError("the file is too short")
        return found.to(self.device)


def write(path: Path, tensors: list[Tensor]) -> None:
    """Write the entries of `tensors` to a new file, one after the other."""
    with path.open("wb") as file:
        for tensor in tensors:
            plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
            file.write(entries(plain))


def entries(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor of the host, as they lie there."""
    # ctypes needs neither NumPy nor a copy, and takes every dtype.
    return (
        (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        if tensor.nbytes
        else bytearray()
    )
