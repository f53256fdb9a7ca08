"""Counts the bytes of tensors that are alive, by watching their storages come and go."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import tree
from bilevel.tree import Tree


class LiveBytes(TorchDispatchMode):
    """Inside this context, what was made inside it and is still alive.

    Attributes:
        now: bytes alive.
        peak: most bytes alive at once.
    """

    def __init__(self) -> None:
        """Start from nothing."""
        super().__init__()
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and note the storages that it made."""
        found = func(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        for key, storage in storages(found).items():
            if key not in given:
                size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, size).atexit = False
        return found

    def _free(self, size: int) -> None:
        self.now -= size


def storages(values: Tree) -> dict[int, Any]:
    """The storages of the tensors of a tree, each once."""
    tensors = (x for x in tree.leaves_of(values) if isinstance(x, Tensor))
    return {s._cdata: s for s in (x.untyped_storage() for x in tensors)}


def bytes_of(values: Tree) -> int:
    """Bytes of the storages of a tree; views of one storage count once."""
    return sum(storage.nbytes() for storage in storages(values).values())
