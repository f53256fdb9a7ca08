"""Tensors of another device, with their numbers: what hard-codes the CPU fails with them.

They say that they are on `meta`, and hold what they stand for in the memory of the host. An
operation on one of them and on a tensor of the CPU that has axes is refused, as on a GPU.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

AWAY = torch.device("meta")


class Elsewhere(Tensor):
    """A tensor on `meta` that has numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held):
        held = held.resolve_conj().resolve_neg()  # torch's own marks are not seen through
        found = torch.Tensor._make_wrapper_subclass(
            *(cls, held.shape),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=AWAY,
        )
        found.held = held
        return found

    def __repr__(self):
        return f"Elsewhere({self.held!r})"

    # Two methods that torch answers without asking a subclass.
    def tolist(self):
        return self.held.tolist()

    def new_tensor(self, data, **options):
        return Elsewhere(self.held.new_tensor(data, **options))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """Inside, tensors can be made and moved there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    away = [x for x in tensors if isinstance(x, Elsewhere)]
    here = [x for x in tensors if not isinstance(x, Elsewhere)]
    device = kwargs.get("device")
    moved = device is not None and torch.device(device).type == AWAY.type
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if away and any(x.ndim for x in here) and not moves:
        raise RuntimeError(f"{func} got tensors of two devices: {[x.shape for x in here]} on cpu")
    there = moved or (device is None and bool(away))
    kwargs = {**kwargs, **({"device": "cpu"} if moved else {})}
    found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if func is torch.ops.aten.copy_.default:
        return args[0]
    changed = {id(x.held): x for x in away}

    def back(x):
        if not isinstance(x, Tensor):
            return x
        known = changed.get(id(x))
        return Elsewhere(x) if known is None else known

    return tree_map(back, found) if there else found


def _held(x):
    return x.held if isinstance(x, Elsewhere) else x


def away(x):
    """A tensor moved there."""
    return Elsewhere(x.detach().clone()) if isinstance(x, Tensor) else x


def back(x):
    """A tensor moved back."""
    return x.detach().held.clone() if isinstance(x, Elsewhere) else x
