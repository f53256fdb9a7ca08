"""Modules that a user's function closes over, and their buffers kept as they are.

Modules that train over several processes are refused wherever they are found.

A step is evaluated again when its block is reversed. A BatchNorm layer that it closes over would
count those evaluations as further batches: its buffers are put back after each.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.errors import UnsupportedError

_PLAIN = (str, bytes, int, float, complex, type(None), ModuleType, type)
LARGE = 1000  # containers of more entries hold data, not modules


def modules_of(*roots: Any) -> list[nn.Module]:
    """The modules that functions, methods and dataclasses reach, each once.

    Followed are closures, defaults, the global names that a function reads, what a method belongs
    to, and the attributes of these. What a function finds in another way is not seen.

    Args:
        roots: functions, or objects that hold them.

    Returns:
        The modules; parts of one are not named beside it.
    """
    return [one for one in _walk(roots) if isinstance(one, nn.Module)]


def tensors_of(*roots: Any) -> list[Tensor]:
    """The tensors that functions, methods and dataclasses reach as `modules_of` finds modules."""
    return [one for one in _walk(roots) if isinstance(one, Tensor)]


def _walk(roots: tuple[Any, ...]) -> Iterator[Any]:
    seen, waiting = set[int](), [*roots]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, _PLAIN):
            continue
        seen.add(id(one))
        yield one
        if not isinstance(one, nn.Module | Tensor):
            waiting += _reached(one)


def _reached(one: Any) -> Iterable[Any]:
    match one:
        case FunctionType():
            names = _names(one.__code__)
            read = (one.__globals__[name] for name in names if name in one.__globals__)
            return [*map(_content, one.__closure__ or ()), *(one.__defaults__ or ()), *read]
        case MethodType():
            return one.__func__, one.__self__
        case partial():
            return one.func, *one.args, *one.keywords.values()
        case Mapping() if len(one) <= LARGE:
            return one.values()
        case list() | tuple() if len(one) <= LARGE:
            return one
    own = type(one).__module__.partition(".")[0] not in ("builtins", "torch", "numpy")
    if not own:
        return ()
    call = getattr(type(one), "__call__", None)  # noqa: B004  what it reads counts too
    return [*getattr(one, "__dict__", {}).values(), *([call] if call else []), *_methods(one)]


def _methods(one: Any) -> list[Any]:
    """The functions of a user's own dynamics: they read globals as a step does."""
    return [getattr(type(one), name, None) for name in ("init", "step", "readout")]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


@lru_cache(maxsize=1000)
def _names(code: CodeType) -> frozenset[str]:
    """The global names that a function reads, and those of functions written inside it."""
    inside = (part for part in code.co_consts if isinstance(part, CodeType))
    return frozenset(code.co_names).union(*map(_names, inside))


def buffers_of(*roots: Any) -> list[Tensor]:
    """The buffers of the modules that the roots reach."""
    parts = (part for module in modules_of(*roots) for part in module.modules())
    return [value for part in parts for value in part._buffers.values() if value is not None]


@contextmanager
def buffers_kept(*roots: Any) -> Iterator[None]:
    """The buffers of the modules that the roots reach leave the block as they entered it."""
    places = [
        (part, name, value, value.clone())
        for module in modules_of(*roots)
        for part in module.modules()
        for name, value in part._buffers.items()
        if value is not None
    ]
    try:
        yield
    finally:
        for part, name, value, before in places:
            # Compared, since kernels of torch write to running statistics without counting it; and
            # not written to in vain, which a graph that needs the buffer would take amiss.
            if not torch.equal(value, before):
                with torch.no_grad():
                    value.copy_(before)
            part._buffers[name] = value


def refuse_wrapped(*models: nn.Module) -> None:
    """Refuse modules whose backward pass talks to other processes: gradients here never see it.

    Args:
        models: they, and all their parts.

    Raises:
        UnsupportedError: naming the module, and what to do.
    """
    # What was not imported is no module of the caller's.
    names = {
        "torch.nn.parallel": ("DistributedDataParallel",),
        "torch.distributed.fsdp": ("FullyShardedDataParallel", "FSDPModule"),
    }
    wrappers = tuple(
        kind
        for room, kinds in names.items()
        for kind in (getattr(sys.modules.get(room), name, None) for name in kinds)
        if isinstance(kind, type)
    )
    for name, part in (named for model in models for named in model.named_modules()):
        if isinstance(part, wrappers):
            remedy = (
                "Pass the module that it wraps (model.module)"
                if hasattr(part, "module")
                else "Call functional on a copy made before fully_shard, and take the parameters "
                "of the sharded one as params, {name: p.detach() for name, p in "
                "sharded.named_parameters()}"
            )
            raise UnsupportedError(
                f"{name or 'the module'} is a {type(part).__name__}, which averages or gathers in "
                "its own backward pass; a plain function of its parameters does not, and every "
                f"process would go its own way in silence. {remedy}; and give the solver "
                "replicas=bilevel.Replicas(), which averages over the processes."
            )


def refuse_wrapped_in(*roots: Any) -> None:
    """Refuse functions that reach a module which trains over several processes.

    Args:
        roots: functions, or objects that hold them.

    Raises:
        UnsupportedError: naming the module, and what to do.
    """
    # Where processes do not know each other there is no such module.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        refuse_wrapped(*modules_of(*roots))
