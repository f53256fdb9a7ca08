"""Tensors of which each process holds a part: `DTensor`, as `fully_shard` makes parameters."""

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def _kind() -> Any:
    """The class of such tensors; nothing where no caller has imported it."""
    room = sys.modules.get("torch.distributed.tensor")
    return getattr(room, "DTensor", ())


def is_shard(x: Any) -> bool:
    """Whether a leaf is a tensor in parts."""
    return isinstance(x, _kind())


def any_shard(leaves: Iterable[Any]) -> bool:
    """Whether a leaf is one."""
    return any(map(is_shard, leaves))


def whole(x: Any) -> Any:
    """All of a leaf, a tensor detached: gathered from the processes where it is in parts."""
    if is_shard(x):
        return x.detach().full_tensor()
    return x.detach() if isinstance(x, Tensor) else x


def local(x: Any) -> Any:
    """The part of a tensor that this process holds; all of one that it holds whole."""
    return x.to_local() if is_shard(x) else x


def like(value: Tensor, other: Any) -> Tensor:
    """A tensor that every process holds whole, in parts where another one is."""
    if not is_shard(other) or is_shard(value):
        return value
    from torch.distributed.tensor import Replicate

    # From the copy of this process, so that nothing is sent.
    copies = [Replicate()] * other.device_mesh.ndim
    replicated = _kind().from_local(value, other.device_mesh, copies, run_check=False)
    return replicated.redistribute(other.device_mesh, other.placements)


def fitted(gradient: Any, x: Any) -> Any:
    """A gradient as the tensor is that it belongs to: whole where that is."""
    return gradient.full_tensor() if is_shard(gradient) and not is_shard(x) else gradient


def length(x: Any, local: float) -> float:
    """The norm of a tensor in parts, of the norm of the part of this process."""
    from torch.distributed.tensor import Replicate, Shard

    places = [Shard(0) if place.is_shard() else Replicate() for place in x.placements]
    own = torch.tensor([local], dtype=torch.float64, device=x.to_local().device)
    each = _kind().from_local(own, x.device_mesh, places, run_check=False)
    return math.hypot(*each.full_tensor().tolist())
