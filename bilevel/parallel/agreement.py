"""Whether processes hold the same: values by their bytes, settings and code by a description."""

import ctypes
import zlib
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from bilevel import shards, tree
from bilevel.tree import Tree

PIECE = 2**26  # bytes read at a time


def checksum(values: Tree) -> int:
    """Of the bytes of all tensors of a tree, in their order, and of its numbers and texts."""
    found = 0
    for leaf in tree.leaves_of(values):
        if shards.is_shard(leaf):  # of which each process holds another part
            continue
        if isinstance(leaf, Tensor):
            found = _of_tensor(leaf, found)
        elif isinstance(leaf, bool | int | float | complex | str | bytes):
            found = zlib.crc32(repr(leaf).encode(), found)
    return found


def unread(values: Tree) -> str:
    """The kind of the first leaf that a checksum cannot see into; empty if there is none."""
    read = Tensor | bool | int | float | complex | str | bytes | None
    return next((type(x).__name__ for x in tree.leaves_of(values) if not isinstance(x, read)), "")


def _of_tensor(x: Tensor, found: int) -> int:
    plain = x.detach().resolve_conj().resolve_neg().cpu().contiguous()
    start = plain.data_ptr()
    for at in range(0, plain.nbytes, PIECE):
        size = min(PIECE, plain.nbytes - at)
        found = zlib.crc32((ctypes.c_char * size).from_address(start + at), found)
    return found


def kinds(values: Tree, name: str) -> dict[str, str]:
    """What the leaves of a tree are, by name."""
    names = tree.leaf_names(values, name)
    return dict(zip(names, map(tree.kind, tree.leaves_of(values)), strict=True))


def described(value: Any, name: str, found: dict[str, str] | None = None) -> dict[str, str]:
    """Settings in words, and functions by a checksum of their code; each under its name.

    Args:
        value: a dataclass of settings, a function, a number, a tree of these.
        name: of it.
        found: what to add to.

    Returns:
        By name.
    """
    known = {} if found is None else found
    match value:
        case None | bool() | int() | float() | complex() | str():
            known[name] = repr(value)
        case Tensor():
            known[name] = tree.kind(value)
        case FunctionType():
            known[name] = f"{value.__qualname__}, code {_of_code(value.__code__):08x}"
        case MethodType():
            described(value.__func__, name, known)
        case partial():
            described(value.func, name, known)
        case tuple() | list():
            for i, item in enumerate(value[:100]):
                described(item, f"{name}[{i}]", known)
        case torch.dtype() | torch.device():
            known[name] = str(value)
        case _ if is_dataclass(value) and not isinstance(value, type):
            known[name] = type(value).__name__
            for field in fields(value):
                described(getattr(value, field.name), f"{name}.{field.name}", known)
        case _:
            known[name] = getattr(value, "__qualname__", type(value).__name__)
    return known


def _of_code(code: CodeType) -> int:
    found = zlib.crc32(code.co_code)
    for constant in code.co_consts:
        inside = isinstance(constant, CodeType)
        said = str(_of_code(constant)) if inside else repr(constant)
        if not isinstance(constant, frozenset):  # whose order is of each process
            found = zlib.crc32(said.encode(), found)
    return zlib.crc32(" ".join(code.co_names).encode(), found)


def differences(each: list[dict[str, str]]) -> str:
    """Where the descriptions of the processes differ, in words; the first five places."""
    names = dict.fromkeys(name for one in each for name in one)
    wrong = [name for name in names if len({one.get(name) for one in each}) > 1]
    shown = []
    for name in wrong[:5]:
        said = [f"{one.get(name, 'nothing')} (rank {i})" for i, one in enumerate(each)]
        shown.append(f"{name} is {', '.join(dict.fromkeys(said))}")
    more = f"; and {len(wrong) - 5} more places" if len(wrong) > 5 else ""
    return "; ".join(shown) + more
